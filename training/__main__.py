"""The lab: what made the published weights, and what measures, checks and publishes them.

python -m training COMMAND --help
"""

import importlib
import sys
from collections.abc import Sequence

# name: module whose main() it runs, and what it does
COMMANDS = {
    "pretrain": ("training.pretrain", "pretrain a backbone by a recipe"),
    "photos": ("training.photos", "write the data set photos, from four public ones"),
    "evaluate": ("training.evaluation.probes", "k-NN and probes of frozen layers, rotation accuracy"),
    "finetune": ("training.evaluation.finetune", "fine-tuning, few labels, the supervised baseline"),
    "probe-layers": ("training.evaluation.layers", "the paper's ImageNet and Places probes, all layers in one pass"),
    "voc": ("training.transfer.classification", "PASCAL VOC classification"),
    "proposals": ("training.transfer.selective_search", "regions of PASCAL VOC's images, for detection"),
    "detect": ("training.transfer.detection", "PASCAL VOC detection"),
    "segment": ("training.transfer.segmentation", "PASCAL VOC segmentation"),
    "measure": ("training.reporting.measure", "the numbers that the card lacks of a network"),
    "check": ("training.reporting.check", "measure the reported numbers again, and compare"),
    "publish": ("training.reporting.publish", "bundle weights, draw figures, render the card, upload to the Hub"),
    "study": ("training.studies.nin_cifar10", "how the recipe of rotnet_nin was chosen"),
    "ablation": ("training.studies.rotations", "which rotations to tell apart: table 2 of the paper"),
    "benchmark": ("training.studies.benchmark", "time of import and loading, speed of training and features"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command:14s}{what}" for command, (_, what) in COMMANDS.items())
        print(f"usage: python -m training COMMAND ...\n\n{__doc__}\ncommands:", *lines, sep="\n")
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # late: a command takes seconds to import
    status: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
