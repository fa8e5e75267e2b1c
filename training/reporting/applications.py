"""What the rotation head is good for, as text: which way up photographs are, and which images do not belong."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotation_ssl.models import ORIENTATION_MODEL
from training.protocols import COVERAGES, PROTOCOLS
from training.reporting.required import CIFAR10, EXIF, main_data
from training.reporting.rows import Row
from training.reporting.tables import cell_table, markdown_table, percent


def orientation_table(rows: Sequence[Row]) -> str:
    """Which way up photographs are: how many answers are right, and how many of those that are decided."""
    found = [row for row in rows if row.protocol.startswith("orientation") and row.measured]
    lines = []
    for weights, data in dict.fromkeys((row.weights, row.data) for row in found):
        own = {row.protocol: row for row in found if (row.weights, row.data) == (weights, data)}
        cells = [percent(own["orientation"])]
        for fitted in ("99", "99.5"):
            decided, wrong = (own[f"orientation-{what}-{fitted}"] for what in ("decided", "wrong"))
            right = 1 - (wrong.correct or 0) / decided.correct if decided.correct else None
            cells += [percent(decided), "" if right is None else f"{100 * right:.2f} %"]
        lines.append((f"`{weights}`, {data}", *cells))
    header = (
        "photographs",
        "all: correct",
        "default threshold: decided",
        "of these correct",
        "99.5 %: decided",
        "of these correct",
    )
    return markdown_table(header, lines) if lines else ""


def coverage_table(rows: Sequence[Row]) -> str:
    """The accuracy on the most confident photographs, over their share."""
    columns = {f"orientation-top-{share}": f"{share} %" for share in COVERAGES} | {"orientation": "all"}
    found = [row for row in rows if row.protocol in columns]
    ranked = {_label(row) for row in found if row.protocol != "orientation"}
    found = [row for row in found if _label(row) in ranked]
    return cell_table(("most confident photographs",), found, _label, lambda row: row.protocol, columns)


def _label(row: Row) -> tuple[str]:
    return (f"`{row.weights}`, {row.data}" if row.measured else f"_{row.source.split(' (')[0]}, {row.data}_",)


def thresholds_line(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The thresholds of the weights that have some."""
    fitted = {name: entry["orientation"] for name, entry in entries.items() if "orientation" in entry}
    return "\n".join(
        f"- `{name}`: {own['threshold']:.4f} by default; `--threshold {own['sure_threshold']:.4f}` for 99.5 %."
        for name, own in fitted.items()
    )


def outliers_table(rows: Sequence[Row]) -> str:
    """How well images that do not belong are told from the normal ones: both scores on every kind of outlier."""
    found = sorted((r for r in rows if r.protocol.startswith("outliers-")), key=lambda row: not row.measured)
    columns = {row.protocol: PROTOCOLS[row.protocol].title.removeprefix("outliers by ") for row in found}

    def line(row: Row) -> tuple[str, str]:
        return main_data(row.weights) or CIFAR10, *_label(row)

    return cell_table(("normal images", "outliers"), found, line, lambda row: row.protocol, columns)


def one_class_line(rows: Sequence[Row]) -> str:
    """The mean AUROC of one-class detection: ours, then those of networks that were trained for it."""
    told = "With one class as normal and the other classes as outliers, the mean AUROC over the classes is"
    own = [f"{percent(row)} on {row.data} by k-NN (`{row.weights}`)" for row in rows if row.protocol == "one-class-knn"]
    quoted = [f"{percent(row)} ({row.source.split(' (')[0]})" for row in rows if row.protocol == "one-class-rotation"]
    if not own:
        return ""
    beside = f" Networks trained on each class of CIFAR-10 separately reach {'; '.join(quoted)}." if quoted else ""
    return f"{told} {' and '.join(own)}. The networks were pretrained on the images of all classes.{beside}"


def orientation_line(rows: Sequence[Row]) -> str:
    """Coverage and precision of the command's network at the default threshold in a sentence."""
    rows = [row for row in rows if row.weights == ORIENTATION_MODEL and row.data != EXIF]
    decided = [row for row in rows if row.protocol == "orientation-decided-99"]
    wrong = {(row.weights, row.data): row for row in rows if row.protocol == "orientation-wrong-99"}
    parts = []
    for row in decided:
        part = f"{percent(row)} of {row.data}"
        if row.correct:
            right = 1 - (wrong[row.weights, row.data].correct or 0) / row.correct
            part += f" ({100 * right:.2f} % of these decisions are correct)"
        parts.append(part)
    return f"At the default threshold, `orient` decides on {' and on '.join(parts)}." if parts else ""


def outliers_line(rows: Sequence[Row]) -> str:
    """AUROC of both scores of each network against its first kind of outliers in a sentence."""
    found = [row for row in rows if row.protocol in ("outliers-rotation", "outliers-knn") and row.measured]
    told = []
    for weights in dict.fromkeys(row.weights for row in found):
        own = [row for row in found if row.weights == weights]
        first = [row for row in own if row.data == own[0].data]
        numbers = " and ".join(f"{percent(r)} by {PROTOCOLS[r.protocol].title.split()[2].strip(',')}" for r in first)
        normal = f"With {main_data(weights) or CIFAR10} as normal images and {first[0].data} as outliers"
        told.append(f"{normal}, `{weights}` reaches an AUROC of {numbers}.")
    return " ".join(told)
