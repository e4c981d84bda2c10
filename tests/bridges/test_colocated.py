"""Colocated modules: tokens that vary, images dealt out by cost, ranks that disagree."""

from contextlib import ExitStack

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case
from layouts import COLOCATED, LAYOUTS, LOSSES, MANY_BUCKETS, SHARDED, VARYING, parallel
from ranks import world

from megatron_mimo_coord import MultiModuleCoordinator
from megatron_mimo_coord.bridges.shared_bridges import SharedBridges
from megatron_mimo_coord.cpu import host_sync
from megatron_mimo_coord.layout.image_assignment import assign_images

FAN_OUT = LAYOUTS["colocated, fan-out"]
EQUAL = {name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")}
ENCODERS_FIRST = {
    "vision": parallel(dp=4, rank_offset=0),
    "language": parallel(pp=2, dp=2, rank_offset=0),
}
TWO_ENCODERS = {
    "vision": parallel(tp=2, dp=2, rank_offset=0),
    "audio": parallel(dp=4, rank_offset=0),
    "language": parallel(tp=2, dp=2, rank_offset=0),
}
# Microbatches whose images all lie in one slice, have none, or only one.
ONE_SIDED = (((3, 3, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)), ((0, 0, 1, 4),))
OTHER_SIDE = (((0, 0, 2, 2), (1, 0, 2, 1), (0, 0, 0, 0)), ((0, 2, 0, 1),))


@pytest.mark.parametrize("modules", [COLOCATED, FAN_OUT, EQUAL], ids=["in", "out", "equal"])
def test_assigned_images_give_the_oracles_gradients(modules):
    # The oracle has no ranks. forward_only passes before each step, with other images.
    case = Case(
        modules=modules,
        images={"vision": ONE_SIDED + VARYING["vision"]},
        assign=1,
        num_microbatches=3,
        steps=3,
        evaluate=True,
        ddp=MANY_BUCKETS | SHARDED,
    )
    world(case.world_size).run("cases:check", case)


def test_each_encoder_has_its_own_assignment():
    case = Case(
        modules=TWO_ENCODERS,
        images={"vision": ONE_SIDED, "audio": OTHER_SIDE},
        assign=1,
        num_microbatches=3,
        steps=2,
        per_token=LOSSES["per token"],
        ddp=MANY_BUCKETS,
    )
    world(case.world_size).run("cases:check", case)


@pytest.mark.parametrize("assign", [False, True], ids=["slices", "assigned"])
def test_ranks_without_images_take_part_as_the_others_do(assign):
    # A frozen encoder wants no gradient, so they must not wait for one either.
    case = Case(
        modules=COLOCATED,
        images={"vision": ONE_SIDED},
        assign=assign,
        num_microbatches=3,
        frozen=("vision.",),
    )
    world(case.world_size).run("cases:check", case)


# -- ranks that disagree ---------------------------------------------------------------------------

WRONG = {
    "tokens": lambda call: call | {"tokens": [*call["tokens"][:3], [2, 2, 7]], "costs": None},
    "samples": lambda call: call | {"sample_ids": [*call["sample_ids"][:3], -5]},
    "costs": lambda call: call | {"costs": [[50], *call["costs"][1:]]},
    "no call": lambda call: None,
    "too many": lambda call: call | {"tokens": [[5] * len(row) for row in call["tokens"]]},
}
SAYS = {
    "tokens": "sample 3 has tokens (2, 2) and id ",
    "samples": "tokens (2, 2) and id -5 on rank 1",
    "costs": "sample 0 has costs (1,) on rank 0, costs (50,) on rank 1",
    "no call": "images of vision were assigned on rank 0, but not on rank 1: call assign_images",
    "too many": "the vision encoder returned 4 tokens on rank 0, but assign_images gave that rank "
    "images of 10 tokens; feed it",
}


def _complaint(case, kind, wrong_ranks):
    """What this rank is told when some say something else of the second microbatch."""
    calls = []
    original = MultiModuleCoordinator.assign_images

    def assign(self, name, tokens, costs, sample_ids):
        calls.append(name)
        given = {"tokens": tokens, "costs": costs, "sample_ids": sample_ids}
        if len(calls) != 2 or dist.get_rank() not in wrong_ranks:
            return original(self, name, **given)
        wrong = WRONG[kind](given)
        if wrong is not None:
            original(self, name, **wrong)
        return assign_images(self._grids[name], dist.get_rank(), **given)

    MultiModuleCoordinator.assign_images = assign
    try:
        for _ in cases.train(case):
            pass
    except RuntimeError as error:
        return str(error)
    finally:
        MultiModuleCoordinator.assign_images = original
    return ""


def _complaints(case, kinds):
    return {kind: _complaint(case, kind, (0, 1) if kind == "too many" else (1,)) for kind in kinds}


@pytest.mark.parametrize(
    ("modules", "kinds"),
    [(COLOCATED, [*WRONG]), (ENCODERS_FIRST, ["samples", "no call"])],
    ids=["colocated", "encoders first"],
)
def test_ranks_that_disagree_are_named_on_every_rank(modules, kinds):
    case = Case(modules=modules, images={"vision": (((1, 1, 0, 2),),)}, assign=1, no_optimizer=True)
    for complaints in world(case.world_size).run("test_colocated:_complaints", case, kinds):
        assert complaints.keys() == {*kinds}
        for kind, complaint in complaints.items():
            assert complaint.startswith("microbatch 1: "), (kind, complaint)
            assert SAYS[kind] in complaint, (kind, complaint)
            assert kind == "too many" or ("rank 0" in complaint and "rank 1" in complaint)


def test_a_call_that_one_rank_leaves_out_is_found_without_siblings():
    case = Case(modules=EQUAL, assign=1, no_optimizer=True)
    _, errors = world(case.world_size).try_run("test_colocated:_raise_complaint", case)
    assert any(SAYS["no call"] in text for _, text in errors.values()), errors


def _raise_complaint(case):
    raise RuntimeError(_complaint(case, "no call", (1,)))


# -- the device ------------------------------------------------------------------------------------


def _without_waiting(case):
    """Run a case; between modules no rank may wait for its device, nor send integers over it.

    But for what is counted: where nobody said how many tokens its samples have.
    """

    def inside(value, function):
        def call(*args):
            before, host_sync._inside[:] = list(host_sync._inside), value
            try:
                return function(*args)
            finally:
                host_sync._inside[:] = before

        return call

    def read(bridges, numbers):
        counts["waits"] += bool(numbers)
        return original_read(bridges, numbers)

    def batch(ops):
        counts["batches"] += 1
        assert all(op.tensor.is_floating_point() for op in ops)
        return original_batch(ops)

    def gather(output, *args, **options):
        assert output.dtype == torch.int64 and dist.get_backend(options["group"]) == "gloo"
        counts["statements"] += 1
        return original_gather(output, *args, **options)

    original_read, original_batch = SharedBridges._read, dist.batch_isend_irecv
    original_gather = dist.all_gather_into_tensor
    counts = dict.fromkeys(["batches", "statements", "waits"], 0)

    def between_modules(function):
        def call(*args):
            with (
                cases._replaced(dist, "batch_isend_irecv", batch),
                cases._replaced(dist, "all_gather_into_tensor", gather),
            ):
                return function(*args)

        return inside([True], call)

    with ExitStack() as stack:
        for name in ("say", "deliver", "_give_back"):
            replacement = between_modules(getattr(SharedBridges, name))
            stack.enter_context(cases._replaced(SharedBridges, name, replacement))
        stack.enter_context(cases._replaced(SharedBridges, "_read", inside([], read)))
        cases.check(case)
    return counts


@pytest.mark.parametrize(
    ("modules", "assign", "expected"),
    [
        # Two of three microbatches have images: a batch out or back, two steps. On fan-in each rank
        # has the gradients of its own tokens, on fan-out those tokens: one of both is there.
        (COLOCATED, 1, {"batches": 4, "statements": 6}),
        (COLOCATED, 0, {"batches": 4, "statements": 6}),
        (FAN_OUT, 1, {"batches": 4, "statements": 6}),
        (FAN_OUT, 0, {"batches": 4, "statements": 6, "waits": 4}),
        (EQUAL, 2, {"batches": 8, "statements": 6}),
        (EQUAL, 0, {"statements": 6}),
    ],
    ids=["in", "in slices", "out", "out slices", "equal", "equal slices"],
)
def test_no_rank_waits_for_its_device_between_modules(modules, assign, expected):
    images = {"vision": (((3, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 2)),)}
    case = Case(modules=modules, images=images, assign=assign, num_microbatches=3, steps=2)
    for counts in world(2, rehearse=True).run("test_colocated:_without_waiting", case):
        assert {name: count for name, count in counts.items() if count} == expected
