"""Result rows as Markdown tables. Quoted numbers are in italics, and name their source."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rotation_ssl.evaluation.report import spread_text
from training.protocols import PROTOCOLS
from training.recipes import RECIPES
from training.reporting.required import RANDOM, RESCALED, main_data
from training.reporting.rows import Row, model_of

# whose quoted numbers are, by the weights that the rows name
QUOTED = {
    "paper": "paper",
    "paper-supervised": "paper, pretrained with ImageNet labels",
    "paper-places": "paper, pretrained with Places205 labels",
    "paper-rescaled": "paper, random weights rescaled",
    "paper-random": "paper, random weights",
}
TWO_DECIMALS = (", table 1", ", table 2", ", table 3")  # the paper's tables of Network-in-Network
HEADLINE = ("rotation", "nonlinear", "conv", "finetune-conv", "linear-sgd", "nonlinear-sgd")


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a header; '' for an empty cell."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" if row is not rows[1] else f"|{'|'.join(row)}|" for row in rows)


def cell_table(
    header: Sequence[str],
    rows: Iterable[Row],
    line: Callable[[Row], tuple[str, ...]],
    column: Callable[[Row], str],
    columns: Mapping[str, str],
) -> str:
    """The rows' values in a table; '' without rows.

    Args:
        header: titles of what ``line`` gives.
        rows: one for each cell, or one for each seed.
        line: the first cells of the line that a row stands in; rows of equal ones share it.
        column: the column that a row stands in.
        columns: their titles, in their order.
    """
    cells: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault(line(row), {}).setdefault(column(row), []).append(row)
    lines = [(*first, *(_cell_text(found.get(key, [])) for key in columns)) for first, found in cells.items()]
    return markdown_table((*header, *columns.values()), lines) if lines else ""


def percent(row: Row) -> str:
    """A row's value. A quoted one is in italics, with a mark where no printed copy was at hand."""
    if row.measured:
        return f"{100 * row.value:.2f} %"
    return f"{quoted_text([row])}{' (unchecked)' if 'unchecked' in row.source else ''}"


def _cell_text(rows: Sequence[Row]) -> str:
    return percent(rows[0]) if len(rows) == 1 else spread_text(rows)


def quoted_text(rows: Sequence[Row]) -> str:
    """Quoted rows in italics; '' without rows. Only the tables of :data:`TWO_DECIMALS` print a second decimal of 0."""
    if not rows:
        return ""
    text = spread_text(rows)
    return f"_{text if rows[0].source.endswith(TWO_DECIMALS) else text.replace('0 %', ' %')}_"


def select(rows: Iterable[Row], weights: str, measured: bool = True) -> list[Row]:
    """The rows of some weights that this project measured, or those that it quotes."""
    return [row for row in rows if row.weights == weights and row.measured == measured]


def is_transfer(row: Row) -> bool:
    """Whether a row is of a transfer to PASCAL VOC."""
    return row.protocol.startswith("voc-")


def is_application(row: Row) -> bool:
    """Whether a row is of neither the pretext task nor a probe: it has a table of its own."""
    return is_transfer(row) or row.protocol.startswith(("orientation", "outliers", "one-class"))


def whose(row: Row, budget: str = "") -> str:
    """Whose weights a row is of, with the budget: ours, random ones, or quoted ones in italics with their table."""
    tag = row.weights.partition(".")[2]
    if not row.measured:
        return f"_{QUOTED[tag]}, {row.source.rpartition(', ')[2]}{budget}_"
    return {RANDOM: "random weights", RESCALED: "random weights, rescaled"}.get(tag, f"`{row.weights}`") + budget


def data_in_words(data: str) -> str:
    """The data's name in a row, in words: 'the validation images of Tiny-ImageNet'."""
    name, _, split = data.rpartition(" ")
    return f"the {'validation' if split == 'val' else split} images of {name}"


def results_tables(rows: Sequence[Row], bundled: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each dataset: our weights, random ones and the paper's, a column for each protocol."""
    rows = [row for row in rows if not is_application(row)]
    own = [row for row in rows if row.measured and row.weights in bundled]
    probed = dict.fromkeys(row.data for row in own if row.protocol != "rotation")
    tables = [
        f"On {data_in_words(data)}:\n\n{_results_table([row for row in rows if row.data == data], bundled, PROTOCOLS)}"
        for data in probed
    ]
    return "\n\n".join([*tables, *_rotation_tables([row for row in own if row.data not in probed])])


def headline_tables(rows: Sequence[Row], bundled: Mapping[str, Mapping[str, Any]]) -> str:
    """The first tables of the README: of each network the data and protocols that it is first of all probed by."""
    tables, probed = [], {row.weights for row in rows if row.layer}
    for data in dict.fromkeys(map(main_data, bundled)):
        own = {name: entry for name, entry in bundled.items() if main_data(name) == data and name in probed}
        table = _results_table([row for row in rows if row.data == data], own, HEADLINE)
        models = " and ".join(f"`{model}`" for model in dict.fromkeys(map(model_of, own)))
        tables.append(f"{models} on {data_in_words(data)}:\n\n{table}")
    return "\n\n".join(tables)


def _rotation_tables(rows: Sequence[Row]) -> list[str]:
    """One table of rotation accuracies, a column for each dataset; no table without any."""
    rows = [row for row in rows if row.protocol == "rotation"]
    data = {row.data: row.data for row in rows}
    table = cell_table(("weights",), rows, lambda row: (f"`{row.weights}`",), lambda row: row.data, data)
    return [f"Rotation accuracy on other held-out photographs:\n\n{table}"] if rows else []


def _results_table(rows: Sequence[Row], bundled: Mapping[str, Mapping[str, Any]], ids: Iterable[str]) -> str:
    """A column for each protocol and budget of ours; the paper's numbers stand at the last, largest budget of ours."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for weights, entry in bundled.items():
        if not select(rows, weights):
            continue
        layer, model = entry["recommended_layer"], model_of(weights)
        groups = [(f"`{weights}`", select(rows, weights)), ("random weights", select(rows, f"{model}.random"))]
        paper = [row for row in select(rows, f"{model}.paper", measured=False) if row.source.startswith("paper")]
        groups.append(("_paper, paper budget_", paper))
        for label, group in groups:
            found = [row for row in group if row.layer in ("", layer) and row.labels_per_class is None]
            if found:
                lines[label, f"`{layer}`"] = found
    lines = dict(sorted(lines.items(), key=lambda line: line[1][0].weights not in bundled))  # ours first
    have = {(row.protocol, row.budget) for own in lines.values() for row in own if row.weights in bundled}
    columns = [(id, budget) for id in ids for budget in PROTOCOLS[id].recipes if (id, budget) in have]
    largest = dict(columns)

    def shown(found: Sequence[Row], id: str, budget: str) -> str:
        if found[0].measured:
            return spread_text([row for row in found if (row.protocol, row.budget) == (id, budget)])
        return " ".join(percent(row) for row in found if row.protocol == id and budget == largest[id])

    return markdown_table(
        ("weights", "layer", *(PROTOCOLS[id].titled(budget) for id, budget in columns)),
        ((*key, *(shown(found, *column) for column in columns)) for key, found in lines.items()),
    )


def probe_table(name: str, rows: Sequence[Row]) -> list[str]:
    """Every probe of every layer of published weights, of random ones and the paper's, of one dataset; no lines where
    none of the weights was measured.
    """
    model = model_of(name)
    groups = {
        f"`{name}`": select(rows, name),
        "random weights": select(rows, f"{model}.random"),
        **_quoted_groups(rows, f"{model}.paper", ""),
        **_quoted_groups(rows, f"{model}.paper-random", ", random weights"),
    }
    groups = {
        label: [row for row in group if row.layer and row.labels_per_class is None and not is_application(row)]
        for label, group in groups.items()
    }
    if not groups[f"`{name}`"]:
        return []
    probed = [row for group in groups.values() for row in group]
    layers = sorted({row.layer for row in probed})
    lines: list[tuple[str, ...]] = []
    for protocol in (id for id in PROTOCOLS if any(row.protocol == id for row in probed)):
        ours: dict[str, list[Row]] = {}
        for label, group in groups.items():
            # the gap is that of the last, largest budget of ours
            for budget in PROTOCOLS[protocol].recipes:
                if not (chosen := [row for row in group if (row.protocol, row.budget) == (protocol, budget)]):
                    continue
                cells = {layer: [row for row in chosen if row.layer == layer] for layer in layers}
                lines.append(_probe_line(chosen[0], label, cells))
                if label == f"`{name}`":
                    ours = cells
                if chosen[0].source.startswith("paper") and "random" not in label and ours:
                    gaps = (_gap(ours[layer], cells[layer]) for layer in layers)
                    lines.append(("gap", chosen[0].source, *gaps))
    quoting = "Numbers in italics are quoted; the gap to the paper's, at its full budget, is in percentage points."
    return [
        f"Accuracy on {data_in_words(probed[0].data)} of classifiers on each layer. Backbones are frozen except in the"
        f" fine-tuned and supervised rows. ± is the standard deviation over seeds."
        f"{f' {quoting}' if any(row.source != 'measured' for row in probed) else ''}",
        "",
        markdown_table(("protocol", "weights", *layers), lines),
        "",
        *_settings_lines(groups[f"`{name}`"], groups["random weights"]),
        "",
    ]


def few_labels_table(name: str, rows: Sequence[Row]) -> list[str]:
    """Accuracy over labels of each class; no lines where none was measured."""
    model = model_of(name)
    own = [row for row in (*select(rows, name), *select(rows, f"{model}.random")) if row.labels_per_class]
    if not select(own, name):
        return []
    quoted = [row for row in select(rows, f"{model}.paper", measured=False) if row.labels_per_class]
    labels = sorted({row.labels_per_class or 0 for row in own})
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in (*own, *quoted):
        groups.setdefault((row.title, row.layer, row.draw, row.weights, row.source), []).append(row)
    lines = []
    for (title, layer, draw, weights, source), chosen in groups.items():
        what, label, show = f"{title} on {layer}, {draw} images", f"`{weights}`", spread_text
        if source != "measured":
            what, label, show = f"_{what}_", f"_{source}_", quoted_text
        texts = [show([row for row in chosen if row.labels_per_class == count]) for count in labels]
        lines.append((what, label, *texts))
    everything = " (5,000 are all of CIFAR-10)" if 5000 in labels else ""
    header = ("protocol", "weights", *(f"{count:,}" for count in labels))
    # those of several seeds once
    settings: dict[tuple[str, str], dict[str, None]] = {}
    for row in own:
        settings.setdefault((row.title, row.settings), {}).setdefault(f"{row.labels_per_class:,}")
    trained = [f"- {title}, {', '.join(counts)} labels: {text}." for (title, text), counts in settings.items()]
    title = f"Accuracy by number of labels of each class{everything}:"
    return [title, "", markdown_table(header, lines), "", *trained, ""]


def rotation_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """Rotation accuracy of published weights, of random ones and of others, on one dataset; no lines where none is."""
    model = model_of(name)
    found = [row for row in select(rows, name) if row.protocol == "rotation"]
    if not found:
        return []
    lines = [f"Rotation accuracy, all four rotations of {data_in_words(found[0].data)} (chance is 25 %):", ""]
    for label, group in (("these weights", found), ("random weights", select(rows, f"{model}.random"))):
        lines += [
            f"- {label}: **{percent(row)}** ({row.correct:,} of {row.n:,})"
            for row in group
            if row.protocol == "rotation"
        ]
    quoted = [row for row in select(rows, f"{model}.paper", measured=False) if row.protocol == "rotation"]
    return [*lines, *(f"- {row.settings}: {percent(row)} ({row.source})" for row in quoted), ""]


def evaluation_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """Rotation accuracy and every probe of published weights, on each dataset that they were measured on."""
    lines = []
    for data in dict.fromkeys(row.data for row in select(rows, name)):
        there = [row for row in rows if row.data == data]
        lines += rotation_lines(name, there)
        lines += probe_table(name, there)
        lines += few_labels_table(name, there)
    return lines


def ablation_table(measured: Sequence[Row], rows: Sequence[Row]) -> str:
    """The paper's ablations at this project's small budget next to the paper's.

    Args:
        measured: rows of ``training.studies.rotations``.
        rows: all others, the quoted ones among them.
    """
    seen = sorted({RECIPES[row.recipe].rotated_images for row in measured})
    lines = []
    for name in dict.fromkeys(row.recipe for row in measured):
        recipe = RECIPES[name]
        degrees = ", ".join(str(rotation * recipe.rotation_unit) for rotation in recipe.rotations)
        quoted = f"{recipe.model}{name.partition('-ablation')[2]}.paper"
        paper = [row for row in rows if (row.weights, row.layer, row.protocol) == (quoted, "block2", "nonlinear")]
        cells = [f"{percent(row)} ({row.source})" for row in paper if row.source.startswith("paper")]
        own = spread_text([row for row in measured if row.recipe == name])
        lines.append((f"`{recipe.model}`: {degrees}", f"`{name}`", own, ", ".join(cells)))
    computed = {row.settings.rpartition("features in ")[2] for row in measured if "features in " in row.settings}
    precision = f"Features are computed in {' or '.join(sorted(computed))}." if computed else ""
    precision = precision or "The precision of the features was not recorded."
    header = ("network, degrees", "recipe", "non-linear probe (cached) of block2", "paper, 100 epochs")
    return f"""### Which rotations to tell apart

Networks pretrained on {" or ".join(f"{count:,}" for count in seen)} rotated images each (recipes
`nin-cifar10-ablation...`, command `python -m training ablation`; not published). ± is the standard deviation over
seeds of the probe. Each was pretrained once: another pretraining seed moves such numbers by some tenths of a point
(training/studies/nin_cifar10.md), so differences of that size say nothing. With fewer rotations, as many rotated images
come from more upright ones: two rotations have seen twice as many as four, eight half as many. In steps of 45 degrees
all eight views are resampled and masked to a circle. {precision}

{markdown_table(header, lines)}"""


def _probe_line(first: Row, label: str, cells: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    if first.measured:
        return first.title, label, *map(spread_text, cells.values())
    return f"_{first.title}_", label, *map(quoted_text, cells.values())


def _settings_lines(own: Sequence[Row], random: Sequence[Row]) -> list[str]:
    """What the protocols' names leave open: with the layers where they differ, and random weights' where others."""
    ours, theirs = _settings(own), _settings(random)
    shown = []
    for title in dict.fromkeys((*ours, *theirs)):
        for whose, settings in (([], ours.get(title, {})), (["random weights"], theirs.get(title, {}))):
            if whose and settings == ours.get(title):
                continue
            for text, layers in settings.items():
                of = ", ".join(whose + layers * (len(settings) > 1))
                shown.append(f"- {title}{f', {of}' if of else ''}: {text}.")
    return shown


def _settings(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """By protocol and budget the settings, each with its layers."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        layers = found.setdefault(row.title, {}).setdefault(row.settings, [])
        layers += [row.layer] if row.layer not in layers else []
    return found


def _quoted_groups(rows: Sequence[Row], weights: str, suffix: str) -> dict[str, list[Row]]:
    quoted = [row for row in select(rows, weights, measured=False) if row.layer]
    return {
        f"_{s}{suffix}_": [row for row in quoted if row.source == s] for s in dict.fromkeys(r.source for r in quoted)
    }


def _gap(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    if not ours or not theirs:
        return ""
    return f"{100 * (sum(r.value for r in ours) / len(ours) - sum(r.value for r in theirs) / len(theirs)):+.2f}"
