"""Ranks that die, raise or hang in the middle of a step."""

import os
import signal
from datetime import timedelta
from typing import Any

import pytest
from cases import Case
from layouts import LAYOUTS, OVERLAP, parallel
from ranks import TIMEOUT, world


def _timeouts(case: Case) -> list[timedelta]:
    """Of every process group that a job makes on this rank."""
    import torch
    import torch.distributed as dist
    from cases import train

    before = list(dist.distributed_c10d._world.pg_map)
    for _ in train(case):
        groups = dist.distributed_c10d._world.pg_map
        return [
            group._get_backend(torch.device("cpu")).options._timeout
            for group in groups
            if isinstance(group, dist.ProcessGroup) and group not in before
        ]
    raise AssertionError("there is a step")


@pytest.mark.parametrize("name", ["fan-in, pipeline", "fan-out", "colocated"])
def test_every_group_waits_as_long_as_the_world(name):
    case = Case(modules=LAYOUTS[name])
    for timeouts in world(case.world_size, rehearse=False).run("test_faults:_timeouts", case):
        assert len(timeouts) > 5
        assert set(timeouts) == {TIMEOUT}


def _die(case: Case, rank: int, when: str) -> Any:
    """A step in which a rank is killed in forward, in backward or while gradients are reduced."""
    import cases
    import torch
    import torch.distributed as dist

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        forward, finalize = cases._forward_step, cases.MultiModuleCoordinator.finalize_model_grads

        def forward_and_die(*arguments: Any) -> Any:
            if when == "forward":
                die()
            output, loss = forward(*arguments)
            for tensor in output.values() if isinstance(output, dict) else [output]:
                if when == "backward" and torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(die)
            return output, loss

        def finalize_and_die(self: Any, *arguments: Any, **options: Any) -> None:
            if when == "finalize":
                die()
            finalize(self, *arguments, **options)

        cases._forward_step = forward_and_die
        cases.MultiModuleCoordinator.finalize_model_grads = finalize_and_die
    for _ in cases.train(case):
        pass


@pytest.mark.parametrize("when", ["forward", "backward", "finalize"])
@pytest.mark.parametrize(
    ("case", "rank"),
    [
        (Case(modules=LAYOUTS["fan-in, pipeline"]), 1),
        (Case(modules={"vision": parallel(dp=2), "language": parallel(pp=2)}, ddp=OVERLAP), 3),
        (Case(modules=LAYOUTS["colocated"]), 0),
    ],
)
def test_when_a_rank_is_killed_the_others_stop_with_an_error(case, rank, when):
    ranks = world(case.world_size)
    answers, errors = ranks.try_run("test_faults:_die", case, rank, when)
    assert not answers
    assert errors.pop(rank)[0] == "ProcessDied"
    assert len(errors) == case.world_size - 1
    assert all(name not in ("Timeout", "ProcessDied") for name, _ in errors.values()), errors
