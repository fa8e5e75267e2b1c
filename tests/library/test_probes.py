import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from rotation_ssl.probes import (
    convolutional_probe,
    fit_logistic,
    knn_predict,
    linear_predict,
    nonlinear_probe,
    probe_predict,
    train_probe,
)


def clusters(count, seed=0, spread=0.5):
    """Three groups of points around three axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return F.one_hot(labels, 5).float() + spread * torch.randn(count, 5, generator=generator), labels


def test_knn_by_hand():
    # the query is nearest to class 0, but two points of class 1 together outvote it at a high temperature
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[2.0, 0.0]])
    votes = (math.exp(1 / 1.0), math.exp(0.8) + math.exp(0.6))
    assert votes[1] > votes[0]
    assert knn_predict(train, labels, query, 3, k=3, temperature=1.0).tolist() == [1]
    cold = (math.exp(1 / 0.07), math.exp(0.8 / 0.07) + math.exp(0.6 / 0.07))
    assert cold[0] > cold[1]
    assert knn_predict(train, labels, query, 3, k=3, temperature=0.07).tolist() == [0]


def test_knn_ignores_the_length_of_features():
    train, labels = clusters(60)
    test, _ = clusters(20, seed=1)
    scaled = train * torch.rand(60, 1).add(0.1)
    assert torch.equal(knn_predict(train, labels, test, 3), knn_predict(scaled, labels, 7 * test, 3))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-300])
def test_knn_at_small_temperatures_is_the_nearest_neighbour(temperature):
    train, labels = clusters(60)
    test, _ = clusters(20, seed=1)
    nearest = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).argmax(1)
    assert torch.equal(knn_predict(train, labels, test, 3, temperature=temperature), labels[nearest])


@given(st.integers(-100, 100), st.integers(-100, 100))
def test_knn_does_not_depend_on_powers_of_two(train_power, test_power):
    train, labels = clusters(60)
    test, _ = clusters(20, seed=1)
    scaled = knn_predict(train * 2.0**train_power, labels, test * 2.0**test_power, 3)
    assert torch.equal(scaled, knn_predict(train, labels, test, 3))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_large_and_small_features_are_as_good(scale):
    train, labels = clusters(60)
    test, _ = clusters(20, seed=1)
    if scale > 1:
        linear = linear_predict(scale * train, labels, scale * test, 3, validation=20)[0]
        assert torch.equal(linear, linear_predict(train, labels, test, 3, validation=20)[0])
    assert torch.equal(knn_predict(scale * train, labels, scale * test, 3), knn_predict(train, labels, test, 3))


def test_knn_agrees_with_scikit_learn():
    train, labels = clusters(300, spread=1.0)
    test, _ = clusters(100, seed=1, spread=1.0)

    def weight(distance):
        return np.exp((1 - distance) / 0.07)

    reference = KNeighborsClassifier(20, weights=weight, metric="cosine").fit(train.numpy(), labels.numpy())
    assert knn_predict(train, labels, test, 3).tolist() == reference.predict(test.numpy()).tolist()


def test_logistic_of_two_points_by_hand():
    # one feature, x = +1 of class 1 and x = -1 of class 0: by symmetry the weights are -w and w, the biases 0, and
    # d/dw of log(1 + exp(-2w)) + s w^2 vanishes where s w = sigmoid(-2w)
    strength = 0.1
    weight, bias = fit_logistic(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]), 2, strength)
    w = weight[1, 0].item()
    assert weight[0, 0].item() == pytest.approx(-w, abs=1e-5) and bias.abs().max() < 1e-5
    assert strength * w == pytest.approx(1 / (1 + math.exp(2 * w)), abs=1e-4)


def test_logistic_agrees_with_scikit_learn():
    train, labels = clusters(200, spread=1.0)
    strength = 0.03
    reference = LogisticRegression(C=1 / (strength * len(train)), tol=1e-8, max_iter=1000).fit(train, labels)
    weight, _ = fit_logistic(train, labels, 3, strength, iterations=300)
    torch.testing.assert_close(weight, torch.tensor(reference.coef_).float(), rtol=1e-3, atol=1e-3)


def test_linear_predict_learns_and_chooses():
    train, labels = clusters(600)
    test, expected = clusters(300, seed=1)
    predictions, strength = linear_predict(train * 100 + 5, labels, test * 100 + 5, 3, validation=100)
    assert (predictions == expected).float().mean() > 0.8
    assert strength in (1e-1, 1e-2, 1e-3)


def test_a_strong_penalty_wins_where_features_are_many_and_noisy():
    labels = torch.arange(300) % 2
    features = 0.15 * (2.0 * labels - 1)[:, None] + torch.randn(300, 100)
    assert linear_predict(features, labels, features[:5], 2, validation=150, strengths=(10.0, 1e-5))[1] == 10.0


def test_a_weak_penalty_wins_where_only_a_difference_of_features_tells():
    # the strong penalty keeps to the class means, which the noise that both features share drowns
    labels = torch.arange(300) % 2
    noise = 3 * torch.randn(300)
    features = torch.stack([0.5 * (2.0 * labels - 1) + noise, noise], 1)
    predictions, strength = linear_predict(features, labels, features, 2, validation=150, strengths=(10.0, 1e-5))
    assert strength == 1e-5 and torch.equal(predictions, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(6)}, "int64"),
        ({"labels": torch.full((6,), 3)}, r"0\.\.2"),
        ({"test": torch.zeros(2, 4)}, r"\(N, D\)"),
        ({"train": torch.full((6, 5), float("nan"))}, "not finite"),
        ({"train": torch.full((6, 5), 1e300, dtype=torch.float64)}, "not finite"),
        ({"test": torch.zeros(0, 5)}, "no features"),
    ],
)
def test_bad_input(change, message):
    inputs = {"train": torch.randn(6, 5), "labels": torch.arange(6) % 3, "test": torch.randn(2, 5)} | change
    for predict in (
        lambda: knn_predict(inputs["train"], inputs["labels"], inputs["test"], 3, k=2),
        lambda: linear_predict(inputs["train"], inputs["labels"], inputs["test"], 3, validation=2),
    ):
        with pytest.raises(ValueError, match=message):
            predict()


def test_ranges():
    train, labels = clusters(6)
    with pytest.raises(ValueError, match="1 to the 6 training images, got 7"):
        knn_predict(train, labels, train, 3, k=7)
    with pytest.raises(ValueError, match="validation must be 1 to 5"):
        linear_predict(train, labels, train, 3, validation=6)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            knn_predict(train, labels, train, 3, k=2, temperature=temperature)
    for strengths in ((math.nan,), (0.1, -1.0), (math.inf, 0.1)):
        with pytest.raises(ValueError, match="strength must be finite and not negative"):
            linear_predict(train, labels, train, 3, validation=2, strengths=strengths)
    with pytest.raises(ValueError, match="no strengths"):
        linear_predict(train, labels, train, 3, validation=2, strengths=())
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        linear_predict(train, labels, train, 3, validation=2, iterations=0)
    with pytest.raises(ValueError, match="too large to be standardised"):
        linear_predict(torch.full((6, 5), 3e38), labels, train, 3, validation=2)
    with pytest.raises(ValueError, match="too large to be standardised"):
        linear_predict(torch.ones(6, 5), labels, torch.full((2, 5), 1e33), 3, validation=2)


def set_weights(module, *values):
    """Fill the weights of the layers that have any but batch norms, in their order."""
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    with torch.no_grad():
        for layer, value in zip(layers, values, strict=True):
            layer.weight.copy_(torch.as_tensor(value).expand_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(torch.tensor([0.5, 0.0]))


def test_nonlinear_probe_by_hand():
    # (2, -1) summed with weights 2: relu(2) -> times 3: relu(6) -> logits (6 + 0.5, -6)
    probe = nonlinear_probe(2, 2, hidden=1).eval()
    set_weights(probe, 2.0, 3.0, [[1.0], [-1.0]])
    logits = probe(torch.tensor([[2.0, -1.0]]).view(1, 2, 1, 1))
    torch.testing.assert_close(logits, torch.tensor([[6.5, -6.0]]), rtol=1e-4, atol=0)
    # a negative sum stops at the first ReLU
    torch.testing.assert_close(probe(torch.tensor([[-2.0, 1.0]])), torch.tensor([[0.5, 0.0]]))
    assert [tuple(p.shape) for p in nonlinear_probe(12_288, 10).parameters() if p.ndim == 2] == [
        (200, 12_288), (200, 200), (10, 200)
    ]  # fmt: skip


def test_convolutional_probe_by_hand():
    # a 3 x 3 filter of ones on a 2 x 2 map sums all of it, everywhere; 1 x 1 weights 2 and 3; the mean of four sixties
    probe = convolutional_probe(1, 2, channels=1).eval()
    set_weights(probe, 1.0, 2.0, 3.0, [[1.0], [-1.0]])
    logits = probe(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    torch.testing.assert_close(logits, torch.tensor([[60.5, -60.0]]), rtol=1e-4, atol=0)
    shapes = [tuple(p.shape) for p in convolutional_probe(96, 10).parameters() if p.ndim == 4]
    assert shapes == [(192, 96, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]


def test_two_steps_of_training_by_hand():
    # one feature 1 of class 0, weights 0: the gradient is (p0 - 1, p1) = (-0.5, 0.5); Nesterov's first step is
    # 1.9 times it. Then logits are (0.095, -0.095), the gradient -g of p = sigmoid(0.19), momentum 0.9 * 0.5 + g, and
    # the rate a fifth.
    probe = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(probe.weight)
    data = [(torch.ones(1, 1), torch.tensor([0]))]
    settings = {"milestones": (1,), "lr": 0.1, "weight_decay": 0.0}
    train_probe(probe, lambda epoch: data, epochs=2, **settings)
    g = 1 - 1 / (1 + math.exp(-0.19))
    expected = 0.1 * 1.9 * 0.5 + 0.02 * (g + 0.9 * (0.9 * 0.5 + g))
    assert probe.weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert probe.weight[1, 0].item() == pytest.approx(-expected, rel=1e-5)


def test_training_has_the_momentum_and_the_weight_decay_that_are_given(monkeypatch):
    made, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: made.append(sgd(*args, **options)) or made[-1])
    data = [(torch.ones(2, 1), torch.tensor([0, 1]))]
    settings = {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.02}
    train_probe(torch.nn.Linear(1, 2), lambda epoch: data, epochs=1, **settings)
    assert {name: made[0].defaults[name] for name in settings} == settings
    assert len(made) == 1 and made[0].defaults["nesterov"]


@pytest.mark.parametrize("build", [lambda: nonlinear_probe(45, 3, hidden=16), lambda: convolutional_probe(5, 3, 16)])
def test_probes_learn_a_handful_and_tell_new_ones(build):
    train, labels = clusters(90, spread=0.2)
    test, expected = clusters(60, seed=1, spread=0.2)
    maps, test_maps = (f[:, :, None, None].expand(-1, -1, 3, 3).contiguous() for f in (train, test))
    probe = build()
    epochs = []

    def batches(epoch):
        epochs.append(epoch)
        for part in torch.randperm(90, generator=torch.Generator().manual_seed(epoch)).split(30):
            yield maps[part], labels[part]

    train_probe(probe, batches, epochs=20, milestones=(15,))
    assert epochs == list(range(20)) and not probe.training
    assert (probe_predict(probe, test_maps.bfloat16(), batch_size=7) == expected).float().mean() > 0.9


@pytest.mark.parametrize("outer", [False, True])
def test_training_in_bfloat16_follows_the_weights(outer):
    """autocast's cache holds weights as they were at the first step, within a caller's autocast too."""
    data = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))]
    settings = {"epochs": 8, "milestones": (), "lr": 0.5, "weight_decay": 0.0}
    losses = {}
    for precision in (None, torch.bfloat16):
        torch.manual_seed(0)
        probe = torch.nn.Linear(1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            train_probe(probe, lambda epoch: data, **settings, autocast=precision)
        losses[precision] = torch.nn.functional.cross_entropy(probe(data[0][0]), data[0][1]).item()
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.02) and losses[None] < 0.1


def test_linear_probe_takes_bfloat16():
    train, labels = clusters(60)
    predictions, _ = linear_predict(train.bfloat16(), labels, train[:5].bfloat16(), 3, validation=10)
    assert predictions.shape == (5,)


def test_test_features_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="the probe's logits are not finite"):
        probe_predict(nonlinear_probe(2, 3, hidden=4), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))


def test_training_that_goes_wrong_is_an_error():
    with pytest.raises(ValueError, match="no features to train the probe on in epoch 0"):
        train_probe(torch.nn.Linear(1, 2), lambda epoch: [])
    data = [(torch.full((2, 1), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="the loss of the probe became nan in step 1: lower"):
        train_probe(torch.nn.Linear(1, 2), lambda epoch: data)
