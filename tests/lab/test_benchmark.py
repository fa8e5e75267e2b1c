"""What is compared is the same thing done twice, and the ratio is of the two."""

import torch

from training.studies import benchmark


def test_both_ways_load_the_same_tensors():
    by_timm, ours = benchmark.load_by_timm().state_dict(), benchmark.load_ours().state_dict()
    assert by_timm.keys() == ours.keys() and all(torch.equal(by_timm[name], ours[name]) for name in ours)


def test_the_two_are_taken_in_turns_and_the_first_round_does_not_count():
    calls = []
    base, ours = benchmark.compare(lambda: calls.append("base"), lambda: calls.append("ours"), rounds=2)
    assert calls == ["ours", "base", "base", "ours", "ours", "base"] and base > 0 and ours > 0


def test_the_command_prints_a_ratio(capsys):
    assert benchmark.main(["load", "--rounds", "1"]) == 0
    assert "ratio" in capsys.readouterr().out
