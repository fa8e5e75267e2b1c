"""Research code for rotation_ssl: train, evaluate, check and publish weights.

Run `python -m training COMMAND --help` for the options of a command.
"""

import importlib
import sys
from collections.abc import Sequence

# name: module whose main() it runs, and what it does
COMMANDS = {
    "pretrain": ("training.pretrain", "pretrain a backbone with a recipe"),
    "photos": ("training.photos", "build the dataset `photos` from four public datasets"),
    "evaluate": ("training.evaluation.probes", "rotation accuracy, k-NN and probes of frozen layers"),
    "finetune": ("training.evaluation.finetune", "fine-tune, train on few labels, or train the supervised baseline"),
    "orientation": (
        "training.evaluation.orientation",
        "how accurately the orientation of photographs is predicted",
    ),
    "outliers": ("training.evaluation.outliers", "how well outliers are distinguished from normal images"),
    "probe-layers": (
        "training.evaluation.layers",
        "the paper's probes of all layers, on ImageNet, Places and smaller datasets",
    ),
    "voc": ("training.transfer.classification", "PASCAL VOC classification"),
    "proposals": ("training.transfer.selective_search", "region proposals for PASCAL VOC's images, for Fast R-CNN"),
    "detect": ("training.transfer.detection", "PASCAL VOC detection"),
    "segment": ("training.transfer.segmentation", "PASCAL VOC segmentation"),
    "measure": ("training.reporting.measure", "measure the numbers that the model card still lacks"),
    "check": ("training.reporting.check", "reproduce the reported numbers"),
    "publish": ("training.reporting.publish", "bundle weights, draw figures, render pages, upload to the Hub"),
    "study": ("training.studies.nin_cifar10", "the study that chose the recipe of rotnet_nin"),
    "networks": ("training.studies.networks", "the study of networks for the orientation of photographs"),
    "ablation": ("training.studies.rotations", "ablation of the rotations, table 2 of the paper"),
    "page": ("training.page", "build the page that predicts orientation in the browser"),
    "benchmark": ("training.studies.benchmark", "speed of importing, loading, training and feature extraction"),
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
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        print(f"error: {name} needs {error.name}: pip install -e '.[train]'", file=sys.stderr)
        return 2
    status: int = module.main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
