"""Classifiers on frozen features: tensors in, predictions out.

They know no backbones: use them with the features of :func:`rotation_ssl.features.extract_features`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.fit import fit

#: L2 penalties that :func:`linear_predict` chooses from.
LINEAR_STRENGTHS = (1e-1, 1e-2, 1e-3)


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """k-NN by cosine similarity, votes weighted by exp(similarity / temperature).

    The protocol of Wu et al. 2018 (https://arxiv.org/abs/1805.01978) with k = 20.

    Args:
        train_features: (N, D).
        train_labels: (N,) int64 in 0..num_classes - 1.
        test_features: (M, D).
        num_classes: K.
        k: number of neighbours, at most N.
        temperature: of the votes, positive.

    Returns:
        (M,) int64; the first of classes with equal votes.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or k or temperature out of range.
    """
    _check(train_features, train_labels, test_features, num_classes)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must be 1 to the {len(train_features)} training images, got {k}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    train = unit_rows(train_features)
    predictions = []
    for part in test_features.split(1000):
        similarity, neighbours = (unit_rows(part) @ train.T).topk(k, dim=1)
        # relative to the nearest neighbour: exp of the similarities themselves overflows at small temperatures
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, train_labels[neighbours], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    num_classes: int,
    validation: int,
    strengths: Sequence[float] = LINEAR_STRENGTHS,
    iterations: int = 100,
    evaluated: Callable[[], object] = lambda: None,
) -> tuple[torch.Tensor, float]:
    """Logistic regression on standardised features; the L2 strength is chosen on a split of the training set.

    Features are standardised by the training set's mean and standard deviation. The strength with the best accuracy on
    the last ``validation`` training images is chosen, then the model is fitted on the whole training set. The loss is
    the mean cross-entropy plus strength / 2 times the squared norm of the weights (not of the bias), minimised by
    L-BFGS from zero. While choosing, each strength starts from the solution of the next larger one.

    Args:
        train_features: (N, D).
        train_labels: (N,) int64 in 0..num_classes - 1.
        test_features: (M, D).
        num_classes: K.
        validation: number of images in the split, less than N.
        strengths: candidates, 0 or more.
        iterations: largest number of L-BFGS iterations of a fit.
        evaluated: called after each evaluation of the loss, to show progress.

    Returns:
        (M,) int64 predictions, and the chosen strength.

    Raises:
        ValueError: shapes that do not fit, features that are not finite or too large, or a split, strength or number of
            iterations out of range.
    """
    _check(train_features, train_labels, test_features, num_classes)
    if not strengths:
        raise ValueError("no strengths to choose from: give at least one")
    if not 0 < validation < len(train_features):
        raise ValueError(f"validation must be 1 to {len(train_features) - 1} training images, got {validation}")
    train_features, test_features = train_features.float(), test_features.float()
    mean = train_features.mean(0)
    deviation = train_features.std(0, correction=0).clamp_min(1e-6)
    train, test = (train_features - mean) / deviation, (test_features - mean) / deviation
    if not all(values.isfinite().all() for values in (mean, deviation, test)):
        raise ValueError("features are too large to be standardised in float32: divide them by a constant")
    if len(strengths) > 1:
        strength = _choose_strength(train, train_labels, num_classes, validation, strengths, iterations, evaluated)
    else:
        strength = strengths[0]
    fitted = fit_logistic(train, train_labels, num_classes, strength, iterations, evaluated=evaluated)
    return F.linear(test, *fitted).argmax(1), strength


def fit_logistic(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    strength: float,
    iterations: int = 100,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    evaluated: Callable[[], object] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression by L-BFGS: weight (K, D) and bias (K,), float32, of a linear layer.

    Minimises the mean cross-entropy plus ``strength`` / 2 times the squared norm of the weight, from zero or ``start``.
    ``evaluated`` is called after each evaluation of the loss.

    Raises:
        ValueError: a strength that is negative or not finite, or less than one iteration.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    # (K, D), not (D, K): on CPUs the gradient, a product with ten columns, would be several times slower
    if start is None:
        start = torch.zeros(num_classes, features.shape[1], device=features.device), features.new_zeros(num_classes)
    weight, bias = (part.clone().requires_grad_(True) for part in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + strength / 2 * weight.square().sum()
        loss.backward()
        evaluated()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def nonlinear_probe(in_features: int, num_classes: int, hidden: int = 200) -> nn.Sequential:
    """The paper's non-linear classifier: flatten, two hidden layers of 200 with batch norm and ReLU, a linear layer.

    Table 1 of Gidaris et al. 2018, with the authors' hidden layers without bias. Takes (N, D) or (N, C, H, W) with
    D = C * H * W = ``in_features``; gives logits (N, num_classes).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (in_features, hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


def max_pooled_probe(in_channels: int, cells: int, num_classes: int) -> nn.Sequential:
    """The ImageNet linear classifier: adaptive max-pooling to cells x cells, batch norm without scale, a linear layer.

    Table 5 of Gidaris et al. 2018, as in the authors' code (after Zhang et al. 2017). Takes (N, C, H, W) with C =
    ``in_channels``; gives logits (N, num_classes).
    """
    return nn.Sequential(
        nn.AdaptiveMaxPool2d(cells),
        nn.BatchNorm2d(in_channels, affine=False),
        nn.Flatten(),
        nn.Linear(in_channels * cells * cells, num_classes),
    )


def convolutional_probe(in_channels: int, num_classes: int, channels: int = 192) -> nn.Sequential:
    """The paper's convolutional classifier: a NIN block (3 x 3, 1 x 1, 1 x 1), global average pooling, a linear layer.

    Table 3 of Gidaris et al. 2018. Takes (N, C, H, W) with C = ``in_channels``; gives logits (N, num_classes). Filters
    are initialised as in the authors' classifier: normal with standard deviation sqrt(2 / (k * k * out)); the linear
    layer is initialised as PyTorch does, theirs with larger weights.
    """
    layers: list[nn.Module] = []
    for width, kernel in ((in_channels, 3), (channels, 1), (channels, 1)):
        conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(conv.weight, 0.0, (2 / (kernel * kernel * channels)) ** 0.5)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def train_probe(
    probe: nn.Module,
    batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    *,
    epochs: int = 100,
    milestones: Sequence[int] = (20, 40, 45),
    factor: float = 0.2,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    autocast: torch.dtype | None = None,
) -> None:
    """Train a classifier by SGD with Nesterov momentum on the mean cross-entropy; it is in eval mode afterwards.

    The defaults are those of the authors' non-linear classifier. Their convolutional one has milestones 35, 70, 85.

    Args:
        probe: maps features to logits (B, K); trained in place.
        batches: from an epoch, counted from 0, to its pairs of features on the probe's device and labels (B,) int64.
        epochs: number of epochs.
        milestones: epochs before which the learning rate is multiplied by ``factor``.
        factor: of the learning rate at each milestone.
        lr: first learning rate.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        autocast: compute in this type (torch.bfloat16) where PyTorch considers that safe; None: in the weights' type.

    Raises:
        ValueError: an epoch without batches, or a loss that is not finite.
    """
    # fused: otherwise updating the 2.5 million weights of a wide first layer takes a third of a step on CPUs
    optimizer = torch.optim.SGD(
        probe.parameters(), lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=True
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), factor)

    def all_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in range(epochs):
            batch = None
            for batch in batches(epoch):
                yield batch
            if batch is None:
                raise ValueError(f"no features to train the probe on in epoch {epoch}")
            scheduler.step()

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        features, labels = batch
        return F.cross_entropy(probe(features), labels)

    fit(probe, all_batches(), loss_of, optimizer, name="the probe", autocast=autocast, quiet=True)


def probe_predict(probe: nn.Module, features: torch.Tensor, batch_size: int = 1000) -> torch.Tensor:
    """The classes that a trained probe predicts: (N,) int64 for features (N, ...), in eval mode and float32.

    Raises:
        ValueError: logits that are not finite.
    """
    device = next(probe.parameters()).device
    probe.eval()
    with torch.inference_mode():
        logits = torch.cat([probe(part.to(device).float()).cpu() for part in features.split(batch_size)])
    if not logits.isfinite().all():
        raise ValueError("the probe's logits are not finite: check the features, the weights and the images")
    return logits.argmax(1)


def _choose_strength(
    train: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    validation: int,
    strengths: Sequence[float],
    iterations: int,
    evaluated: Callable[[], object],
) -> float:
    fitted, held = train[:-validation], train[-validation:]
    solution, best = None, (-1, 0.0)
    for strength in sorted(strengths, reverse=True):
        solution = fit_logistic(fitted, labels[:-validation], num_classes, strength, iterations, solution, evaluated)
        correct = int((F.linear(held, *solution).argmax(1) == labels[-validation:]).sum())
        best = max(best, (correct, strength))
    return best[1]


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows of length 1 in float32; rows of zeros stay zeros.

    Each row is first scaled by a power of two, which is exact, so that its largest value is near 1: the squares of very
    large or small values would not fit into float32.
    """
    features = features.float()
    exponent = features.abs().amax(1, keepdim=True).frexp().exponent.clamp(-126, 126)
    return F.normalize(features.ldexp(-exponent), dim=1)


def _check(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, num_classes: int) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(train.shape)} and {tuple(test.shape)}")
    if labels.shape != (len(train),) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(train)},) int64, got {tuple(labels.shape)} {labels.dtype}")
    if len(train) == 0 or len(test) == 0:
        raise ValueError(f"no features: {len(train)} of training, {len(test)} of test images")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    # in float32, which the probes compute in: a large double overflows there
    if not (train.float().isfinite().all() and test.float().isfinite().all()):
        raise ValueError("features contain values that are not finite: check the weights and the images")
