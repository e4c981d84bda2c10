"""Bridges that carry whatever number of tokens each sample has."""

import pytest
from cases import Case
from layouts import FAN_IN, FAN_OUT, LAYOUTS, VARYING, parallel
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


@pytest.mark.parametrize(
    ("text", "said"), [("packed", "1 texts, as if they were packed"), ("left out", "no text")]
)
def test_fan_out_is_not_guessed(text, said):
    """Four tokens for each of two ranks, or six and two: nobody but the text can tell."""
    images = {"vision": (((1, 2, 0, 1),),)}
    case = Case(modules=FAN_OUT, images=images, num_microbatches=1, no_optimizer=True)
    _, errors = world(case.world_size).try_run(_train_with_text, case, text)
    assert errors.keys() == {0, 1, 2}
    name, told = errors[0]
    assert name == "RuntimeError" and said in told and "or deal the images out with" in told


def _train_with_text(case, text):
    """Train with another text on the encoder's rank."""
    import cases
    import torch.distributed as dist

    def change(_, args, kwargs):
        kwargs["input_ids"] = kwargs["input_ids"].view(1, -1) if text == "packed" else None
        return args, kwargs

    def hook(infra, model):
        if dist.get_rank() == 0:
            model.register_forward_pre_hook(change, with_kwargs=True)

    list(cases.train(case, built=hook))
