"""The paper's numbers of AlexNet as tables of docs/imagenet.md and docs/transfer.md, from result rows."""

from collections.abc import Sequence

from training.reporting.rows import Row

# the paper's rows: their weights in training/results/, and what they are called
PAPER = {
    "rotnet_alexnet.paper": "RotNet",
    "rotnet_alexnet.paper-supervised": "ImageNet labels",
    "rotnet_alexnet.paper-rescaled": "random weights, rescaled",
    "rotnet_alexnet.paper-random": "random weights",
}
LAYERS = tuple(f"conv{i}" for i in range(1, 6))


def voc_table(rows: Sequence[Row]) -> str:
    """The paper's numbers on PASCAL VOC, from result rows: a line for each weights, a column for each protocol."""
    quoted = [row for row in rows if row.weights in PAPER and row.protocol.startswith("PASCAL VOC")]
    columns = list(dict.fromkeys((row.protocol, row.layer) for row in quoted))
    titles = [f"{protocol.removeprefix('PASCAL VOC ')}, {layer}" for protocol, layer in columns]
    lines = [f"| _{quoted[0].source}_ | {' | '.join(titles)} |", f"|---|{'---|' * len(columns)}"]
    for weights, name in PAPER.items():
        own = {(row.protocol, row.layer): f"_{100 * row.value:.2f} %_" for row in quoted if row.weights == weights}
        lines.append(f"| _{name}_ | {' | '.join(own.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def layer_table(rows: Sequence[Row]) -> str:
    """The paper's numbers on ImageNet and Places205, from result rows: a column for each layer."""
    quoted = [row for row in rows if row.weights in PAPER and row.protocol.startswith("ImageNet")]
    quoted = [row for row in quoted if row.source.startswith("paper")]
    lines = [f"| _paper_ | pretrained | {' | '.join(LAYERS)} |", f"|---|---|{'---|' * len(LAYERS)}"]
    for key in dict.fromkeys((row.protocol, row.data, row.weights, row.settings) for row in quoted):
        own = [row for row in quoted if (row.protocol, row.data, row.weights, row.settings) == key]
        cells = {
            row.layer: f"_{100 * row.value:.1f} %_{' (unchecked)' if 'unchecked' in row.source else ''}" for row in own
        }
        where = f"{own[0].data.partition(' ')[0]}, {own[0].protocol.removeprefix('ImageNet ')}"
        table = own[0].source.rpartition(", ")[2]
        whose = own[0].settings or "by rotation"
        lines.append(f"| _{where} ({table})_ | _{whose}_ | {' | '.join(cells.get(layer, '') for layer in LAYERS)} |")
    return "\n".join(lines)
