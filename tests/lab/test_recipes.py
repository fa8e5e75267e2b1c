"""Recipes are complete values: what is out of range is refused when they are made."""

import dataclasses
import re

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import TINY

from rotation_ssl.pretraining.recipe import (
    AdamW,
    CosineSchedule,
    LinearSchedule,
    Muon,
    Sgd,
    Stage,
    StepSchedule,
    with_image_size,
    with_steps,
)
from training.recipes import NIN_CIFAR10_CPU, RECIPES


def test_recipes_are_complete_values():
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert [NIN_CIFAR10_CPU.crop_at(s) for s in (0, 8399, 8400, 11_999)] == [24, 24, 32, 32]
    assert NIN_CIFAR10_CPU.rotated_images == NIN_CIFAR10_CPU.steps * 64 * 4
    for recipe in RECIPES.values():
        assert timm.is_model(recipe.model) and recipe.steps > 0


def test_ablations_have_the_same_budget():
    base = RECIPES["nin-cifar10-ablation"]
    assert base.rotated_images == 102_400 and base == dataclasses.replace(
        with_steps(NIN_CIFAR10_CPU, 400), name=base.name, note=base.note
    )
    ablations = [recipe for name, recipe in RECIPES.items() if "-ablation" in name]
    assert len(ablations) == 6
    for recipe in ablations:
        assert (recipe.steps, recipe.rotated_images) == (base.steps, base.rotated_images)
        assert recipe.images_per_step * len(recipe.rotations) == 256
        varied = {"name", "note", "model", "images_per_step", "rotations", "rotation_unit"}
        for field in {f.name for f in dataclasses.fields(recipe)} - varied:
            assert getattr(recipe, field) == getattr(base, field)


def test_rotations_and_their_unit_fit():
    for unit, rotations in ((45, (0, 1, 2, 3)), (45, (1, 0, *range(2, 8))), (30, (0, 1, 2, 3))):
        with pytest.raises(ValueError, match=r"rotation_unit must be 90 or 45|must be 0 to 7 in order"):
            dataclasses.replace(TINY, rotation_unit=unit, rotations=rotations)


def steps_of(recipe):
    return [stage.steps for stage in recipe.stages]


def test_steps_in_proportion_by_hand():
    assert steps_of(with_steps(NIN_CIFAR10_CPU, 120)) == [84, 36]
    assert steps_of(with_steps(NIN_CIFAR10_CPU, 2)) == [1, 1]
    assert with_steps(NIN_CIFAR10_CPU, NIN_CIFAR10_CPU.steps) == NIN_CIFAR10_CPU
    uneven = dataclasses.replace(TINY, stages=(Stage(1, 8), Stage(1, 12), Stage(98, 16)))
    assert steps_of(with_steps(uneven, 4)) == [1, 1, 2]
    assert steps_of(with_steps(dataclasses.replace(uneven, stages=uneven.stages[::-1]), 4)) == [2, 1, 1]
    assert steps_of(with_steps(NIN_CIFAR10_CPU, 24_000)) == [16_800, 7200]
    for steps in (-1, 0, 1):
        with pytest.raises(ValueError, match=f"steps must be at least 2, .*, got {steps}$"):
            with_steps(NIN_CIFAR10_CPU, steps)


@pytest.mark.parametrize("steps", range(2, 70, 3))
def test_stages_have_the_steps_asked_for(steps):
    recipe = with_steps(TINY, steps)
    assert recipe.steps == steps and min(steps_of(recipe)) >= 1
    assert abs(steps_of(recipe)[0] - steps * 2 / 3) <= 0.5
    assert [stage.crop for stage in recipe.stages] == [8, 12]


def test_image_sizes_in_proportion_by_hand():
    larger = with_image_size(NIN_CIFAR10_CPU, 64)
    assert [stage.crop for stage in larger.stages] == [48, 64] and larger.padding == 4 and larger.image_size == 64
    assert with_image_size(larger, 32) == NIN_CIFAR10_CPU
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        with_image_size(NIN_CIFAR10_CPU, 0)


def test_crops_that_are_resized_may_be_larger_than_the_image():
    recipe = dataclasses.replace(TINY, scale=(0.5, 1.0), padding=0, stages=(Stage(1, 24), Stage(1, 32)))
    assert recipe.image_size == 16 and recipe.input_size == 32 and TINY.input_size == 16
    assert [stage.crop for stage in with_image_size(recipe, 32).stages] == [48, 64]


@given(st.sampled_from(sorted(RECIPES)), st.integers(1, 500))
def test_every_image_size_gives_a_recipe(name, size):
    recipe = with_image_size(RECIPES[name], size)
    assert all(stage.crop >= 1 and (recipe.scale or stage.crop <= size + 2 * recipe.padding) for stage in recipe.stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "stages must be at least one, got ()"),
        ({"images_per_step": 0}, "images_per_step must be at least 1, got 0"),
        ({"padding": 16}, "padding must be 0 up to the image's pixels, got 16"),
        ({"stages": (Stage(1, 21),)}, "crop of a stage must be at most 20, image and padding, got 21"),
        ({"padding_mode": "edge"}, "padding_mode must be 'reflect' or 'constant', got 'edge'"),
        ({"flip": True}, "flip must be 'none' or 'random' or 'alternate', got True"),
        ({"label_smoothing": 1.0}, "label_smoothing must be 0 up to 1, got 1.0"),
        ({"average": -0.1}, "average must be 0 up to 1, got -0.1"),
        ({"precision": "fp8"}, "precision must be 'auto' or 'fp32' or 'bf16' or 'fp16', got 'fp8'"),
        ({"holdout": -1}, "holdout must be 0 or more images, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"image_size": 0, "padding": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"scale": (0.5, 1.0)}, "padding must be 0 where crops have a scale, got 2"),
        ({"scale": (0.0, 1.0), "padding": 0}, "scale must be two shares of the image's area"),
        ({"scale": (0.5, 0.4), "padding": 0}, "scale must be two shares of the image's area"),
        ({"scale": (0.5, 1.1), "padding": 0}, "scale must be two shares of the image's area"),
        ({"scale": (0.5,), "padding": 0}, "scale must be two shares of the image's area"),
        ({"rotations": (0, 0)}, "rotations must be distinct values of 0, 1, 2, 3"),
        ({"rotations": (0, 4)}, "rotations must be distinct values of 0, 1, 2, 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(0, 24), "steps of a stage must be at least 1, got 0"),
        (lambda: Stage(1, 0), "crop of a stage must be at least 1 pixel, got 0"),
        (lambda: Sgd(lr=0), "lr must be above 0, got 0"),
        (lambda: Sgd(momentum=1), "momentum must be between 0 and 1"),
        (lambda: Sgd(weight_decay=-1), "weight_decay must be 0 or more, got -1"),
        (lambda: Muon(lr=-1), "lr must be above 0, got -1"),
        (lambda: Muon(lr=1, momentum=1), "momentum must be 0 up to 1, got 1"),
        (lambda: AdamW(betas=(0.9, 1.0)), "betas must be 0 up to 1"),
        (lambda: LinearSchedule(-0.1), "warmup and hold must be 0 or more"),
        (lambda: LinearSchedule(0.5, 0.6), "warmup and hold together must be at most 1"),
        (lambda: CosineSchedule(1.0), "warmup must be 0 up to 1, got 1.0"),
        (lambda: StepSchedule((0.5, 1.0), 0.1), "milestones must be fractions of the steps"),
        (lambda: StepSchedule((0.5,), 0.0), "factor must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
