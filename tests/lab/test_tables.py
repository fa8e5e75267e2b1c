"""The tables of the pages, from rows made by hand."""

from training.protocols import PROTOCOLS
from training.reporting.rows import Row
from training.reporting.tables import few_labels_table, percent, probe_table, results_tables

NAME, RANDOM, PAPER = "rotnet_nin.cifar10", "rotnet_nin.random", "rotnet_nin.paper"


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
        row(5000, 0.70, "320 crops, training accuracy 70.0 %", weights=RANDOM, protocol="supervised"),
    ]
    assert few_labels_table(NAME, rows)[3:] == [
        "",
        "- few labels, convolutional probe (cpu), 20, 1,000 labels: 640 crops, training accuracy 100.0 %.",
        "- few labels, convolutional probe (cpu), 5,000 labels: 640 crops, training accuracy 91.5 %.",
        "- supervised (cpu), 5,000 labels: 320 crops, training accuracy 70.0 %.",
        "",
    ]
    assert few_labels_table(NAME, rows[-1:]) == []


def probe(value, budget, weights=NAME, protocol="nonlinear", source="measured", seed=0):
    return Row(weights, protocol, "block2", value, source, "CIFAR-10 test", budget, seed=seed)


# as a file has them: the larger budget first
BUDGETS = [
    probe(0.88, "paper"),
    probe(0.86, "cached"),
    probe(0.87, "cached", seed=1),
    probe(0.84, "cached", protocol="conv"),
    probe(0.67, "cached", RANDOM),
    probe(0.8906, "paper", PAPER, source="paper, table 1", seed=None),
    probe(0.9217, "paper", PAPER, "conv", "paper, table 3", seed=None),
]


def test_quoted_numbers_have_the_digits_of_their_source():
    supervised = probe(0.928, "paper", PAPER, "supervised", "paper, table 3", seed=None)
    assert percent(supervised) == "_92.80 %_"
    unchecked = probe(0.745, "paper", "rotnet_nin5.paper", source="paper (unchecked), table 1", seed=None)
    assert percent(unchecked) == "_74.50 %_ (unchecked)"
    assert "| _92.80 %_ |" in "\n".join(probe_table(NAME, [*BUDGETS, supervised]))
    for value, text in ((0.5, "_50.0 %_"), (0.387, "_38.7 %_"), (0.7087, "_70.87 %_")):
        assert percent(probe(value, "paper", "rotnet_alexnet.paper", source="paper, table 7", seed=None)) == text


def test_budgets_never_share_a_column():
    entries = {NAME: {"source": "bundled", "recommended_layer": "block2"}}
    assert results_tables(BUDGETS, entries).splitlines()[2:] == [
        "| weights | layer | non-linear probe (cached) | non-linear probe (paper) | convolutional probe (cached) |",
        "|---|---|---|---|---|",
        "| `rotnet_nin.cifar10` | `block2` | 86.50 ± 0.71 % | 88.00 % | 84.00 % |",
        "| random weights | `block2` | 67.00 % |  |  |",
        "| _paper, paper budget_ | `block2` |  | _89.06 %_ | _92.17 %_ |",
    ]


def test_the_gap_to_the_paper_is_that_of_the_largest_budget():
    lines = next(part for part in probe_table(NAME, BUDGETS) if part.startswith("|")).splitlines()
    assert lines[2:6] == [
        "| non-linear probe (cached) | `rotnet_nin.cifar10` | 86.50 ± 0.71 % |",
        "| non-linear probe (paper) | `rotnet_nin.cifar10` | 88.00 % |",
        "| non-linear probe (cached) | random weights | 67.00 % |",
        "| _non-linear probe (paper)_ | _paper, table 1_ | _89.06 %_ |",
    ]
    assert lines[6] == "| gap | paper, table 1 | -1.06 |"


def test_the_papers_budget_is_the_last_of_every_protocol():
    budgets = [list(protocol.recipes) for protocol in PROTOCOLS.values() if "paper" in protocol.recipes]
    assert budgets and all(names[-1] == "paper" for names in budgets)
