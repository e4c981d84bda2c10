"""Messages of a step, counted; and what ranks say that were told different things."""

import re
from contextlib import ExitStack
from typing import Any

import pytest
from attrs import evolve
from cases import Case
from layouts import LAYOUTS, parallel
from ranks import world

# -- messages --------------------------------------------------------------------------------------


def _count(case: Case) -> tuple[int, int, int, int]:
    """(tensors sent, tensors received, headers sent, headers received) of one step on this rank."""
    import cases
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_mimo_coord.bridges.headers import HostMessages

    counts = dict.fromkeys([dist.isend, dist.irecv, "send", "receive"], 0)
    run_batch = dist.batch_isend_irecv

    def batch(ops: list[dist.P2POp]) -> Any:
        assert all(op.tensor.is_floating_point() for op in ops), "shapes travel between hosts"
        assert len({(op.op, op.peer) for op in ops}) == len(ops), "one message to each peer"
        for op in ops:
            counts[op.op] += 1
        return run_batch(ops)

    def header(name: str) -> Any:
        original = getattr(HostMessages, name)

        def call(self: HostMessages, *args: Any) -> Any:
            counts[name] += 1
            assert dist.get_backend(self._group) == "gloo"
            return original(self, *args)

        return call

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("Megatron's own communicators stop the device")

    replaced = [
        (dist, "batch_isend_irecv", batch),
        (HostMessages, "send", header("send")),
        (HostMessages, "receive", header("receive")),
        (P2PCommunicator, "_communicate", refuse),
        (BridgeCommunicator, "__init__", refuse),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(cases._replaced(owner, name, replacement))
        cases.check(case)
    return tuple(counts.values())


@pytest.mark.parametrize(
    ("assign", "language"),
    [(0, parallel(tp=2)), (1, parallel(tp=2)), (0, parallel(context_parallel_size=2))],
    ids=["slices", "assigned", "context parallel"],
)
def test_each_tensor_is_one_message_to_each_rank_that_needs_it(assign, language):
    n = 4
    layout = {"vision": parallel(pp=2), "language": language}
    case = Case(modules=layout, num_microbatches=n, assign=assign)
    # The encoder's last stage sends to both lanes; the first of them returns the gradient.
    assert world(4).run(_count, case) == [
        (n, n, n, 0),
        (3 * n, 2 * n, 2 * n, n),
        (n, n, 0, n),
        (0, n, 0, n),
    ]


def test_the_language_models_stages_exchange_no_shapes_either():
    n = 4
    layout = {"vision": parallel(dp=2), "language": parallel(pp=2)}
    images = {"vision": (((2, 0, 0, 1), (0, 0, 0, 0), (0, 0, 3, 1), (0, 0, 0, 0)),)}
    case = Case(modules=layout, images=images, num_microbatches=n)
    # Where a rank has no image no tensor travels: rank 0 has some in one microbatch of four.
    assert world(4).run(_count, case) == [
        (1, 1, n, 0),
        (2, 2, n, 0),
        (n + 3, n + 3, n, 2 * n),
        (n, n, 0, n),
    ]


# -- the device ------------------------------------------------------------------------------------


def _without_waiting(case: Case) -> int:
    """Run a case with blocking launches; outside the model's own code no rank may wait."""
    from unittest.mock import patch

    import cases
    import torch

    from megatron_mimo_coord.cpu import host_sync

    def without(inside: list[bool], function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            before, host_sync._inside[:] = list(host_sync._inside), inside
            try:
                return function(*args, **options)
            finally:
                host_sync._inside[:] = before

        return call

    build_model = cases.weights.build_model

    def build(*args: Any, **options: Any) -> Any:
        model = build_model(*args, **options)
        model.config.deallocate_pipeline_outputs = True
        for encoder in model.modality_submodules.values():
            encoder.module.register_forward_hook(as_view)
        return model

    def as_view(_: Any, __: Any, output: Any) -> Any:  # an encoder may end in one
        return None if output is None else output[:]

    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", CUDA_LAUNCH_BLOCKING="1"))
        for owner, name, replacement in (
            (cases, "run_schedule", without([True], cases.run_schedule)),
            (cases, "_forward_step", without([], cases._forward_step)),
            (torch.autograd, "backward", without([], torch.autograd.backward)),
            (cases.weights, "build_model", build),
        ):
            stack.enter_context(cases._replaced(owner, name, replacement))
        return cases.check(case)


REHEARSED = {
    "fan-in to stages": Case(
        modules={"vision": parallel(dp=2), "language": parallel(pp=2)}, num_microbatches=3, assign=2
    ),
    "fan-out to lanes": Case(modules={"vision": parallel(), "language": parallel(tp=2, dp=2)}),
    "stages to lanes": Case(
        modules={"vision": parallel(pp=2), "language": parallel(tp=2)}, num_microbatches=3, assign=1
    ),
    "lanes to ranks": Case(
        modules={"vision": parallel(tp=2), "language": parallel(dp=2)}, assign=1, evaluate=True
    ),
    "context-parallel lanes": Case(
        modules={"vision": parallel(), "language": parallel(tp=2, context_parallel_size=2)}
    ),
    "any to any": Case(modules=LAYOUTS["equal"], num_microbatches=3, assign=1),
}


@pytest.mark.parametrize("case", REHEARSED.values(), ids=REHEARSED)
def test_no_rank_waits_for_its_device(case):
    images = {"vision": (((3, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 2)),)}
    case = evolve(case, images=images, steps=2)
    assert sum(world(case.world_size, rehearse=True).run(_without_waiting, case)) > 0


def _reads_of_tokens(case: Case) -> int:
    """For how many outputs this rank counts the tokens of its samples, which it reads then."""
    import cases

    from megatron_mimo_coord.bridges.text_tokens import TextTokens

    counts = []
    count = TextTokens._count

    def counted(*args: Any) -> Any:
        counts.append(args)
        return count(*args)

    with cases._replaced(TextTokens, "_count", counted):
        cases.check(case)
    return len(counts)


@pytest.mark.parametrize(("assign", "reads"), [(0, 3), (1, 0)])
def test_fan_out_reads_numbers_of_tokens_once_a_microbatch_at_most(assign, reads):
    images = {"vision": (((3, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 2)),)}
    layout = LAYOUTS["fan-out"]
    case = Case(modules=layout, images=images, num_microbatches=3, assign=assign)
    assert world(3).run(_reads_of_tokens, case) == [reads, 0, 0]


# -- wrong use -------------------------------------------------------------------------------------


def _mistaken(case: Case, rank: int, mistake: str) -> None:
    """Run a case on this rank; on one rank something is wrong with the second microbatch."""
    import cases
    import torch.distributed as dist

    from megatron_mimo_coord import MultiModuleCoordinator
    from megatron_mimo_coord.bridges.assignments import _Pending

    original = MultiModuleCoordinator.assign_images
    calls = []

    def assign_images(self: Any, name: str, tokens: Any, costs: Any, sample_ids: Any) -> Any:
        calls.append(name)
        if len(calls) != 2:
            return original(self, name, tokens, costs, sample_ids)
        if mistake == "not called":
            self._assignments.put = lambda assignment: None
        if mistake == "ids":
            sample_ids = [*sample_ids[:-1], "another"]
        if mistake == "costs":
            costs = [
                [100 * cost if sample else cost for cost in c] for sample, c in enumerate(costs)
            ]
        with ExitStack() as stack:
            if mistake == "not called once":
                left_out = cases._replaced(self._assignments, "put", lambda given: None)
                stack.enter_context(left_out)
            assignment = original(self, name, tokens, costs, sample_ids)
        if mistake == "tokens":
            self._assignments._pending["vision"].to_take.clear()
            original(self, name, [[n + 1 for n in each] for each in tokens], costs, sample_ids)
        return assignment

    if dist.get_rank() == rank:
        MultiModuleCoordinator.assign_images = assign_images
    if mistake == "not called once":  # nor do the language model's ranks, which could tell
        _Pending.compare = lambda *args: None
    cases.check(case)


EQUAL = LAYOUTS["equal"]
MISTAKES = {
    "a language rank has another sample": (
        *(2, "ids"),
        r"microbatch 1: ranks 0 and 2 were given different samples for vision, the first that "
        r"differs is sample 3 of 4",
    ),
    "an encoder rank has another sample": (*(1, "ids"), r"microbatch 1: ranks 0 and 1 .* sample 3"),
    "an encoder rank has other costs": (
        *(1, "costs"),
        r"microbatch 1: ranks 0 and 1 called assign_images\('vision', ...\) with different numbers: "
        r"sample \d has costs \(.*\) on rank 0, costs \(.*\) on rank 1",
    ),
    "an encoder rank is left out": (
        *(1, "not called"),
        r"microbatch 1: images of vision were assigned on rank 3, but not on rank 1",
    ),
    "an encoder rank is left out of one call": (
        *(1, "not called once"),
        r"microbatch 1: images of vision were assigned on rank 0, but not on rank 1",
    ),
    "an encoder makes another number of tokens": (
        *(0, "tokens"),
        r"microbatch 1: ranks 0 and 1 called .* sample 0 has tokens \(3, 3\) and id .* on rank 0",
    ),
}


@pytest.mark.parametrize(("rank", "mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_ranks_that_were_told_different_things_say_so(rank, mistake, message):
    images = {"vision": (((2, 1, 0, 3),),)}
    case = Case(modules=EQUAL, images=images, num_microbatches=3, assign=1)
    _, errors = world(4).try_run(_mistaken, case, rank, mistake)
    told = [text for _, text in errors.values() if re.search(message, text)]
    assert told, "\n".join(text for _, text in errors.values())
