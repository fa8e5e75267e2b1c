"""The transfers to PASCAL VOC as text: ours, those of random weights, and the paper's beside them."""

import statistics
from collections.abc import Sequence

from rotation_ssl.evaluation.report import spread_text
from rotation_ssl.messages import counted
from training.reporting.required import RESCALED, VOC2007
from training.reporting.rows import Row, model_of
from training.reporting.tables import is_transfer, markdown_table, quoted_text, whose

# protocol without the kind of average precision, what is trained, the data, and the column's title
COLUMNS = (
    ("voc-classification", "fc6-8", VOC2007, "classification, fc6-8"),
    ("voc-classification", "all", VOC2007, "classification, all layers"),
    ("voc-fast-rcnn", "all", VOC2007, "detection (Fast R-CNN)"),
    ("voc-segmentation", "all", VOC2007, "segmentation"),
    ("voc-segmentation", "all", "VOC2012 val", "segmentation, VOC2012"),
)
Column = tuple[str, str, str, str]


def transfer_table(rows: Sequence[Row], kind: str = "11-point") -> str:
    """A line for each of the weights, a column for each transfer; the paper's are in italics, with its budget.

    Args:
        kind: of average precision, '11-point' or 'area'. The paper, which does not say which its own are, is shown
            beside '11-point' alone; the overlaps of segmentation too.
    """
    lines = []
    for weights, budget in dict.fromkeys((row.weights, row.budget) for row in rows if is_transfer(row)):
        own = [row for row in rows if is_transfer(row) and (row.weights, row.budget) == (weights, budget)]
        cells = [_cell(own, column, kind) for column in COLUMNS]
        if any(cells):
            lines.append((whose(own[0], _budget(own[0])), *cells))
    # ours first
    lines.sort(key=lambda line: line[0].startswith("_"))
    shown = [0, *(i for i in range(1, 1 + len(COLUMNS)) if any(line[i] for line in lines))]
    header = ("weights", *(title for *_, title in COLUMNS))
    return markdown_table([header[i] for i in shown], [[line[i] for i in shown] for line in lines])


def transfer_margin(rows: Sequence[Row]) -> str:
    """A sentence for each of the published weights: how far above rescaled random weights they are, in points."""
    sentences = []
    measured = [row for row in rows if is_transfer(row) and row.measured]
    for name, budget in dict.fromkeys((row.weights, row.budget) for row in measured if ".random" not in row.weights):
        alike = [row for row in measured if row.budget == budget]
        base = f"{model_of(name)}.{RESCALED}"
        gaps = []
        for column in COLUMNS:
            ours, theirs = (_found(alike, weights, column, "11-point") for weights in (name, base))
            if ours and theirs:
                gap = statistics.mean(row.value for row in ours) - statistics.mean(row.value for row in theirs)
                seeds = min(len(ours), len(theirs))
                # another seed moves the first decimal
                digits = 1 if seeds > 1 else 0
                gaps.append(f"{100 * gap:+.{digits}f} in {column[-1]} ({counted(seeds, 'seed')})")
        if gaps:
            sentences.append(f"`{name}` minus rescaled random weights, in points: {'; '.join(gaps)}.")
    return "\n".join(sentences)


def transfer_times(rows: Sequence[Row]) -> str:
    """A line for each kind of training: its longest time, the test among it, and on how many threads of what."""
    lines = []
    for protocol, layer, data, title in COLUMNS:
        own = [row for row in rows if row.protocol.startswith(protocol) and (row.layer, row.data) == (layer, data)]
        own = [row for row in own if row.seconds]
        if own:
            slowest = max(own, key=lambda row: row.seconds or 0.0)
            minutes = round((slowest.seconds or 0.0) / 60)
            on = f"{counted(slowest.threads or 0, 'thread')} ({slowest.device}, {slowest.precision})"
            lines.append(f"- {title}: at most {minutes} minutes on {on}")
    return "\n".join(lines)


def transfer_lines(rows: Sequence[Row]) -> str:
    """Both tables and the margins."""
    measured = [row for row in rows if is_transfer(row) and row.measured]
    table = transfer_table(rows)
    spread = " ± is the standard deviation over seeds." if "±" in table else ""
    parts = [
        "Classification and detection are measured by mean average precision, segmentation by mean intersection over"
        " union. We report VOC2007's 11-point average precision; the paper does not say which variant its"
        f" classification numbers use.{spread}",
        table,
        transfer_margin(rows),
        f"With average precision as the area under the precision-recall curve:\n\n{transfer_table(measured, 'area')}"
        if measured
        else "",
    ]
    return "\n\n".join(filter(None, parts))


def _found(rows: Sequence[Row], weights: str, column: Column, kind: str) -> list[Row]:
    protocol, layer, data, _ = column
    wanted = (protocol, f"{protocol}-{kind}") if kind == "11-point" else (f"{protocol}-{kind}",)
    own = [row for row in rows if row.protocol in wanted]
    return [row for row in own if (row.weights, row.layer, row.data) == (weights, layer, data)]


def _cell(own: Sequence[Row], column: Column, kind: str) -> str:
    found = _found(own, own[0].weights, column, kind)
    return spread_text(found) if own[0].measured else quoted_text(found)


def _budget(row: Row) -> str:
    if not row.measured:
        return ", paper budget"
    return "" if row.budget == "cpu" else f", {row.budget or 'other'} budget"
