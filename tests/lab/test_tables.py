"""The tables of the pages, from rows made by hand."""

from training.reporting.rows import Row
from training.reporting.tables import few_labels_table

NAME = "rotnet_nin.cifar10"


def row(labels, value, settings, seed=0, weights=NAME, protocol="few-labels"):
    return Row(
        weights,
        protocol,
        "block2",
        value,
        "measured",
        "CIFAR-10 test",
        "cpu",
        settings,
        labels,
        draw="first",
        seed=seed,
    )


def test_few_labels_say_how_they_were_trained():
    rows = [
        row(20, 0.60, "640 crops, training accuracy 100.0 %"),
        row(20, 0.62, "640 crops, training accuracy 100.0 %", seed=1),
        row(1000, 0.80, "640 crops, training accuracy 100.0 %"),
        row(5000, 0.85, "640 crops, training accuracy 91.5 %"),
        row(5000, 0.70, "320 crops, training accuracy 70.0 %", weights="rotnet_nin.random", protocol="supervised"),
    ]
    assert few_labels_table(NAME, rows)[3:] == [
        "",
        "- few labels, convolutional probe (cpu), 20, 1,000 labels: 640 crops, training accuracy 100.0 %.",
        "- few labels, convolutional probe (cpu), 5,000 labels: 640 crops, training accuracy 91.5 %.",
        "- supervised (cpu), 5,000 labels: 320 crops, training accuracy 70.0 %.",
        "",
    ]
    assert few_labels_table(NAME, rows[-1:]) == []
