"""Encoders whose replicas meet in their forward, such as over experts: all run it, or none.

A replica without images would leave the others waiting. It encodes an empty batch instead: it takes
part in every collective, forward and backward, hands on no token, and its gradients are zero. What
such a batch looks like it hears from a replica that has images, host from host.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo_coord.bridges.routes import bridge_ends
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.misfits import Misfit, Misfits
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.empty_batches import run_empty_batches
from megatron_mimo_coord.megatron.forwards import Given
from megatron_mimo_coord.megatron.mimo_model import expect_no_tokens_of
from megatron_mimo_coord.world.gather import all_gather_text
from megatron_mimo_coord.world.groups import ExtraGroups


def run_with_replicas(job: Job, encoders_run: Callable[[], bool], misfits: Misfits) -> None:
    """Feed encoders that would be fed nothing while their replicas run. Collective over the world.

    Args:
        job: knows which modules' replicas meet in their forward.
        encoders_run: whether a forward of the model runs encoders.
        misfits: are told of inputs that cannot be empty; raise in an evaluation.
    """
    groups = ExtraGroups.shared(job.infra.module_to_grid_map[LANGUAGE])
    hosts_of: dict[str, dist.ProcessGroup] = {}
    left_out: set[str] = set()  # of a forward: encoders that no rank runs, as a replica cannot
    for name in filter(LANGUAGE.__ne__, filter(job.meeting.get, job.grids)):
        _, lanes = bridge_ends(job.grids[name], job.grids[name])
        for ranks in zip(*lanes, strict=True):  # that differ in their replica alone
            hosts = groups.hosts(ranks)
            if hosts is not None:
                hosts_of[name] = hosts
        if name in job.ddps:
            run_empty_batches(job.ddps[name], job.changes)

    def fill(given: Given) -> Given:
        """Of encoders without inputs an empty batch, if replicas have some."""
        filled = dict(given.get("modality_inputs") or {})
        left_out.clear()
        for name, group in hosts_of.items() if encoders_run() else ():
            mine = filled.get(name)
            said = all_gather_text(json.dumps(mine, default=_described) if mine else "", group)
            like = next(filter(None, said), "")
            unknown = None if all(said) else re.search(r'"cannot be told": "(\w+)"', like)
            if unknown:
                misfits.tell(_unknown_inputs(name, unknown[1]))
                left_out.add(name)
                filled[name] = None
            elif like and not mine:
                filled[name] = json.loads(like, object_hook=_made)
        return {**given, "modality_inputs": filled}

    if hosts_of:
        expect_no_tokens_of(job.model, left_out, job.changes)
        job.forwards.watch(fill)


def _unknown_inputs(module: str, kind: str) -> Misfit:
    return Misfit(
        (-1, 1),
        f"the replicas of {module} meet in its forward, and one has no inputs: it is to run an "
        f"empty batch, but what others were given holds a {kind}, of which it cannot be told what "
        f"an empty one is: pass tensors, numbers, strings, lists and dicts",
    )


def _described(value: Any) -> dict[str, Any]:
    """In JSON: what a tensor without samples looks like, or what cannot be told."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": [0, *value.shape[1:]] if value.ndim else [], "dtype": dtype}
    return {"cannot be told": type(value).__name__}


def _made(described: dict[str, Any]) -> Any:
    """That tensor; any other mapping as it is."""
    if described.keys() != {"shape", "dtype"}:
        return described
    dtype = getattr(torch, described["dtype"])
    return torch.zeros(described["shape"], dtype=dtype, device=torch.cuda.current_device())
