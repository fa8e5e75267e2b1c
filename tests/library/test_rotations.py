import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rotation_ssl.rotations import count_correct, rotate_all, rotation_labels, rotation_loss

batches = st.builds(
    lambda n, c, size, seed: torch.randint(0, 256, (n, c, size, size), generator=torch.Generator().manual_seed(seed)),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 1000),
)


def test_hand_worked_quarter_turn_is_counter_clockwise():
    image = torch.tensor([[[[1, 2], [3, 4]]]])
    expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert rotate_all(image)[:, 0].tolist() == expected


@given(batches)
def test_rotation_major_order(images):
    turned = rotate_all(images)
    for k in range(4):
        for i in range(len(images)):
            assert torch.equal(turned[k * len(images) + i], torch.rot90(images[i], k, (-2, -1)))


@given(batches)
def test_four_quarter_turns_are_the_identity(images):
    once = images
    for _ in range(4):
        once = rotate_all(once, (1,))
    assert torch.equal(once, images)


@given(batches)
def test_two_quarter_turns_are_a_half_turn(images):
    assert torch.equal(rotate_all(rotate_all(images, (1,)), (1,)), rotate_all(images, (2,)))
    assert torch.equal(rotate_all(images, (2,)), images.flip(-2, -1))


@given(batches)
def test_a_flip_after_the_rotation_would_swap_90_and_270(images):
    mirrored = images.flip(-1)
    assert torch.equal(rotate_all(images, (1,)).flip(-1), rotate_all(mirrored, (3,)))


@given(batches)
def test_no_pixel_is_made_or_lost(images):
    for turned in rotate_all(images).split(len(images)):
        assert torch.equal(turned.flatten(1).sort().values, images.flatten(1).sort().values)


@given(batches, st.sampled_from([(0, 2), (1, 3), (0, 1, 2, 3), (3,)]))
def test_labels_match_the_set_of_rotations(images, rotations):
    turned = rotate_all(images, rotations)
    labels = rotation_labels(len(images), rotations)
    assert len(turned) == len(labels) == len(rotations) * len(images)
    for row, label in zip(turned, labels.tolist(), strict=True):
        turned_back = torch.rot90(row, -rotations[label], (-2, -1))
        assert any(torch.equal(turned_back, image) for image in images)
    assert labels.dtype == torch.int64


def test_labels_of_two_images():
    assert rotation_labels(2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rotation_labels(2, (1, 3)).tolist() == [0, 0, 1, 1]
    assert rotation_labels(0).tolist() == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype):
    images = torch.zeros(2, 3, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    turned = rotate_all(images)
    assert turned.dtype == dtype
    assert turned.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 3, 8, 9), "must be square"), ((3, 8, 8), "batch"), ((2, 2, 3, 8, 8), "batch")]
)
def test_wrong_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        rotate_all(torch.zeros(shape))


@pytest.mark.parametrize("rotations", [(), (0, 0), (4,), (-1, 0)])
def test_wrong_rotations_are_refused(rotations):
    with pytest.raises(ValueError, match="distinct values of 0, 1, 2, 3"):
        rotate_all(torch.zeros(1, 3, 4, 4), rotations)
    with pytest.raises(ValueError, match="distinct values of 0, 1, 2, 3"):
        rotation_labels(1, rotations)


def test_negative_number_of_images_is_refused():
    with pytest.raises(ValueError, match="-1"):
        rotation_labels(-1)


class Oracle(nn.Module):
    """Knows the rotation by a bright corner of the upright image, and says so with the given confidence."""

    def __init__(self, confidence, rotations=4):
        super().__init__()
        self.confidence = confidence
        self.rotations = rotations

    def forward(self, images):
        # the top left corner of the upright image wanders counter-clockwise
        corners = torch.stack([images[:, 0, 0, 0], images[:, 0, -1, 0], images[:, 0, -1, -1], images[:, 0, 0, -1]], 1)
        return self.confidence * corners[:, : self.rotations]


@pytest.fixture
def marked():
    images = torch.zeros(3, 1, 5, 5)
    images[:, :, 0, 0] = 1.0
    return images


def test_loss_of_no_opinion_is_log_4(marked):
    assert rotation_loss(Oracle(0.0), marked).item() == pytest.approx(math.log(4))


def test_loss_by_hand(marked):
    # one logit of 2 for the right rotation, three of 0
    expected = math.log(math.e**2 + 3) - 2
    assert rotation_loss(Oracle(2.0), marked).item() == pytest.approx(expected, abs=1e-6)
    assert rotation_loss(Oracle(2.0).bfloat16(), marked.bfloat16()).dtype == torch.float32


def test_loss_is_differentiable(marked):
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4))
    rotation_loss(model, marked).backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_loss_refuses_a_head_of_another_width(marked):
    with pytest.raises(ValueError, match="num_classes=2"):
        rotation_loss(Oracle(1.0), marked, (0, 2))


def test_loss_of_no_images_is_refused(marked):
    with pytest.raises(ValueError, match="the batch has no images"):
        rotation_loss(Oracle(1.0), marked[:0])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(25, 10), r"must give 4 logits an image.*got shape \(12, 10\): create it with num_classes=4"),
        (lambda flat: flat[:, :4] * math.nan, "logits are not finite"),
    ],
)
def test_counting_refuses_what_is_no_prediction_of_the_rotation(marked, head, message):
    class Model(nn.Module):
        def forward(self, images):
            return head(images.flatten(1))

    with pytest.raises(ValueError, match=message):
        count_correct(Model(), [rotate_all(marked)], 4)


def test_count_correct_and_mode(marked):
    model = Oracle(1.0)
    model.train()
    assert count_correct(model, map(rotate_all, [marked, marked[:1]]), 4) == (16, 16)
    assert count_correct(Oracle(-1.0), [rotate_all(marked)], 4) == (0, 12)
    assert model.training
