"""Encoders whose replicas meet in their forward, such as over experts: all run it, or none.

A replica without images would leave the others waiting. It encodes an empty batch instead: it takes
part in every collective, forward and backward, hands on no token, and its gradients are zero. What
such a batch looks like it hears from a replica that has images, host from host.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo_coord.bridges.routes import bridge_ends
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.misfits import Misfit, unknown_inputs
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.empty_batches import run_empty_batches
from megatron_mimo_coord.megatron.mimo_model import (
    change_modality_inputs,
    expect_no_tokens_of,
)
from megatron_mimo_coord.world.gather import all_gather_text
from megatron_mimo_coord.world.groups import ExtraGroups


def run_with_replicas(
    job: Job, encoders_run: Callable[[], bool], tell: Callable[[Misfit], None], changes: Changes
) -> None:
    """Feed encoders that would be fed nothing while their replicas run. Collective over the world.

    Args:
        job: knows which modules' replicas meet in their forward.
        encoders_run: whether a forward of the model runs encoders.
        tell: told of inputs that cannot be empty; raises in an evaluation.
        changes: where is recorded what is changed in the model.
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
            run_empty_batches(job.ddps[name], changes)

    def fill(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of each encoder, of those with none an empty batch if replicas have some."""
        filled = dict(inputs)
        left_out.clear()
        for name, group in hosts_of.items() if encoders_run() else ():
            mine = filled.get(name)
            said = all_gather_text(json.dumps(mine, default=_described) if mine else "", group)
            like = next(filter(None, said), "")
            unknown = None if all(said) else re.search(r'"cannot be told": "(\w+)"', like)
            if unknown:
                tell(unknown_inputs(name, unknown[1]))
                left_out.add(name)
                filled[name] = None
            elif like and not mine:
                filled[name] = json.loads(like, object_hook=_made)
        return filled

    if hosts_of:
        expect_no_tokens_of(job.model, left_out, changes)
        hook = change_modality_inputs(fill)
        changes.on_close(job.model.register_forward_pre_hook(hook, with_kwargs=True).remove)


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
