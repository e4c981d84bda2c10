"""Bridges that carry whatever number of tokens each sample has."""

import pytest
from cases import Case
from layouts import FAN_IN, LAYOUTS, VARYING, parallel
from ranks import world

UNEVEN_RANKS = {"vision": (((1, 1, 2, 2),),)}


@pytest.mark.parametrize("images", [VARYING, UNEVEN_RANKS], ids=["samples", "ranks"])
def test_megatrons_communicator_fails_with_cause_and_cure(images):
    case = Case(modules=FAN_IN, images=images, megatron_communicator=True)
    _, errors = world(case.world_size).try_run("cases:check", case)
    assert any(
        name == "RuntimeError"
        and "different numbers of vision tokens" in text
        and "coordinator.build_pipeline_communicator(config)" in text
        for name, text in errors.values()
    ), errors


def test_images_are_not_assigned_where_nothing_brings_their_tokens():
    images = {"vision": (((2, 0, 2, 0),),)}
    case = Case(modules=LAYOUTS["equal"], images=images, assign=1, megatron_communicator=True)
    _, errors = world(case.world_size).try_run("cases:check", case)
    assert any(
        "images of vision were assigned to its 2 data-parallel ranks, but nothing" in text
        and "coordinator.build_pipeline_communicator(config)" in text
        for _, text in errors.values()
    ), errors


def test_megatrons_communicator_carries_even_samples():
    case = Case(modules=FAN_IN, megatron_communicator=True)
    world(case.world_size).run("cases:check", case)


def test_a_forward_only_pass_leaves_nothing_behind():
    # Evaluates on samples with other numbers of images before each step: splits must not mix.
    case = Case(modules=FAN_IN, images=VARYING, steps=2, evaluate=True)
    world(case.world_size).run("cases:check", case)


def test_encoders_without_fan_in_are_not_watched():
    case = Case(
        modules={"vision": parallel(), "language": parallel(dp=2)},
        images=VARYING,
        megatron_communicator=True,
    )
    world(case.world_size).run("cases:check", case)


def test_encoders_of_different_depth_do_not_wait_for_each_other():
    modules = {"vision": parallel(pp=2), "audio": parallel(), "language": parallel()}
    case = Case(modules=modules, num_microbatches=4)
    world(case.world_size).run("cases:check", case)
