"""Bars tell the time left: often on a terminal, every half minute in a log."""

import sys

import pytest
import torch

from rotation_ssl.probes import LINEAR_STRENGTHS, linear_predict
from rotation_ssl.progress import progress


@pytest.mark.parametrize(("terminal", "interval"), [(True, 0.5), (False, 30.0)])
def test_how_often_a_bar_is_drawn(monkeypatch, terminal, interval):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress("features", 40) as bar:
        assert (bar.total, bar.unit, bar.mininterval) == (40, "img", interval)


def test_a_bar_over_items_ends_full(capsys):
    assert list(progress("numbers", 3, "number", iter("abc"))) == ["a", "b", "c"]
    assert "numbers: 100%" in capsys.readouterr().err
    assert list(progress("numbers", 1, "number", [5], disable=True)) == [5]
    assert capsys.readouterr().err == ""


def test_a_linear_probe_tells_of_every_evaluation():
    """L-BFGS gives up after 125 of them in 100 iterations: so long is the bar of a fit."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    evaluations = []
    told = linear_predict(features, labels, features, 3, 10, evaluated=lambda: evaluations.append(1))
    assert len(LINEAR_STRENGTHS) + 1 <= len(evaluations) <= 125 * (len(LINEAR_STRENGTHS) + 1)
    silent = linear_predict(features, labels, features, 3, 10)
    assert torch.equal(told[0], silent[0]) and told[1] == silent[1]
