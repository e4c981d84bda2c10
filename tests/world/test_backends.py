"""Any backend, named or not, with whatever PyTorch wraps around it: devices and timeouts."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from cases import Case
from layouts import COLOCATED, OVERLAP, parallel
from ranks import World

from megatron_mimo_coord.world.device import world_device

SOURCE = Path(__file__).parents[2] / "megatron_mimo_coord"
SECONDS = 77
DISJOINT = {"vision": parallel(), "language": parallel()}


@pytest.mark.parametrize(
    ("configuration", "device"),
    [
        ("cuda:nccl", "cuda"),
        ("cuda:nccl-legacy", "cuda"),
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
        ("cpu:mpi,cuda:mpi", "cpu"),
    ],
)
def test_the_device_is_one_that_the_backend_serves(monkeypatch, configuration, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda: configuration)
    assert world_device().type == device


def _worlds(store: str) -> list[Any]:
    """Timeouts of all groups in worlds that are made anew in this process, and warnings."""
    import logging

    import torch
    from cases import train

    from megatron_mimo_coord.world import timeouts

    rank, size = dist.get_rank(), dist.get_world_size()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mimo_coord").addHandler(handler)
    set_timeout = dist.set_timeout
    answers = []
    for number, (backend, debug, lacking) in enumerate(
        [("gloo", "DETAIL", False), (None, "OFF", False), ("gloo", "OFF", True)]
    ):
        dist.destroy_process_group()
        dist.set_debug_level(getattr(dist.DebugLevel, debug))
        dist.init_process_group(
            backend,
            init_method=f"file://{store}{number}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=SECONDS),
        )
        if lacking:
            del dist.set_timeout
        waits = set()
        case = Case(modules=COLOCATED if number else DISJOINT, ddp=OVERLAP, no_optimizer=True)
        for _ in train(case):
            groups = [group for group in dist.distributed_c10d._world.pg_map if group.rank() >= 0]
            # A group that has sent messages can start no collective under DETAIL: ask its options.
            backends = [group._get_backend(torch.device("cpu")) for group in groups]
            waits |= {backend.options._timeout.total_seconds() for backend in backends}
        answers.append((sorted(waits), len(said)))
    dist.set_timeout = set_timeout
    timeouts._warn_once.cache_clear()
    return answers


def test_every_world_is_taken_as_it_comes(tmp_path):
    own = World(2, rehearse=False)
    try:
        answers = own.run("test_backends:_worlds", str(tmp_path / "store"))
    finally:
        own.kill()
    for detail, unnamed, lacking in answers:
        assert detail == unnamed == ([SECONDS], 0)
        assert lacking[1] == 1, "one warning, and the job goes on"


def test_nothing_private_is_asked_of_a_process_group_and_no_collective_pickles():
    private = re.compile(r"\._get_backend|_set_default_timeout|_set_pg_timeout|distributed_c10d")
    pickling = re.compile(r"(gather|broadcast|scatter|send|recv)_object")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        # The room cpu makes "nccl" mean gloo.
        if pickling.search(line) or (path.parent.name != "cpu" and private.search(line))
    ]
    assert found == []
