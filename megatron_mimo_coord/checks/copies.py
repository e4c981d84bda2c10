"""Of what several ranks have copies of, a checkpoint keeps one: are they copies?

Shards that Megatron's ``sharded_state_dict`` calls replicas would be lost but for one. Compared
before each save, as a training may have driven apart what began alike.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.parameters import gradients_of_own_copies, is_tensor_parallel

_SUMMED = (
    ", and give each the sum of their gradients, with copy_to_tensor_model_parallel_region behind "
    "a weight that feeds shards, such as an adapter's first"
)
ROUNDING, DRIFT = 1e-3, 0.05  # parts of its norm by which copies of a weight may differ
PART = 0.1  # and those of its gradient


def copy_problems(job: Job, weights: ShardedWeights) -> Iterator[str]:
    """Which parameters are tensor-parallel by their attributes, but replicas for Megatron."""
    for module, ddp in job.ddps.items():
        for name, param in _replicated(ddp, weights).items():
            tp = job.groups[module].expt_tp if ".experts." in name else job.groups[module].tp
            if is_tensor_parallel(param) and tp.size() > 1:
                yield (
                    f"{name} of module {module!r} is one of {tp.size()} tensor-parallel shards, "
                    f"but the module's sharded_state_dict calls it a replica, of which one would "
                    f"be kept: derive the module from MegatronModule and set its tp_group to "
                    f"pg_collection.tp"
                )


def differing_copies(job: Job, weights: ShardedWeights) -> list[str]:
    """Which parameters differ between ranks that hold the same of them.

    Collective in the groups of the modules. Compares one weighted sum of each. Data-parallel ranks
    get the same update; on tensor-parallel ones kernels may round otherwise, and copies drift apart
    a little in a long training, far less than shards differ.
    """
    found = []
    for module, ddp in job.ddps.items():
        groups = job.groups[module]
        params = dict(ddp.module.named_parameters())
        dense = {name: each for name, each in params.items() if ".experts." not in name}
        copies = {name: each for name, each in _replicated(ddp, weights).items() if name in dense}
        expert = {name: each for name, each in params.items() if name not in dense}
        for kind, alike, group, tolerance, cure in (
            ("tensor-parallel", copies, groups.tp, DRIFT, _SUMMED),
            ("data-parallel", dense, groups.dp_cp, ROUNDING, ""),
            ("data-parallel", expert, groups.expt_dp if expert else None, ROUNDING, ""),
        ):
            if alike and group is not None and group.size() > 1:
                found += [
                    f"{name} of module {module!r} is not the same on the {kind} ranks "
                    f"{dist.get_process_group_ranks(group)}, of which one would be kept: where "
                    f"each has a shard, derive the module from MegatronModule and set its "
                    f"tp_group to pg_collection.tp; else start them alike{cure}"
                    for name in _differing(alike, group, tolerance)
                ]
    return found


def differing_gradients(ddp: DistributedDataParallel, tp: dist.ProcessGroup) -> list[str]:
    """Weights of a trainer's own layers whose tensor-parallel copies get different gradients.

    Not biases, whose gradient may be nothing but rounding errors, as that of keys is, and of what a
    norm follows. Collective in the module's tensor-parallel ranks.
    """
    found = gradients_of_own_copies(ddp)
    gradients = {name: each for name, each in found.items() if not name.endswith("bias")}
    return _differing(gradients, tp, PART) if gradients else []


def differing_buffers(job: Job) -> Iterator[str]:
    """A remark on what modules hold beside weights, and replicas differently. Collective in each.

    Such as the means of a batch norm, which has seen other images on each.
    """
    for module, ddp in job.ddps.items():
        groups, kept = job.groups[module], ddp.module.state_dict(keep_vars=True)
        buffers = {
            name: buffer
            for name, buffer in ddp.module.named_buffers()
            if name in kept and buffer.is_floating_point() and buffer.numel()
        }
        if buffers and groups.dp_cp.size() > 1:
            differing = _differing(buffers, groups.dp_cp, ROUNDING)
            if differing and groups.dp_cp.rank() == 0:
                yield (
                    f"replicas of module {module!r} hold different values of the buffers "
                    f"{listed(differing)}, of which a checkpoint keeps the first replica's"
                )


def _replicated(
    ddp: DistributedDataParallel, weights: ShardedWeights
) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module of which no dim is shared out."""
    named = ddp.module.named_parameters()
    return {name: each for name, each in named if each in weights and weights.is_replicated(each)}


@torch.no_grad()
def _differing(
    params: Mapping[str, torch.Tensor], group: dist.ProcessGroup, tolerance: float
) -> list[str]:
    """Names of those that differ on the ranks of a group. Collective in it."""
    sums = torch.stack([_weighted_sum(param) for param in params.values()])
    norms = torch.stack([param.detach().float().norm() for param in params.values()])
    extremes = torch.stack([sums, -sums, norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, least, norms = extremes[0], -extremes[1], extremes[2]
    rounding = [max(tolerance, 4 * torch.finfo(param.dtype).eps) for param in params.values()]
    differs = most - least > norms * norms.new_tensor(rounding)
    return [name for name, flag in zip(params, differs.tolist(), strict=True) if flag]


def _weighted_sum(param: torch.Tensor) -> torch.Tensor:
    """A sum that is another one for most other values of a parameter, or for another order."""
    weights = torch.arange(param.numel(), dtype=torch.float32, device=param.device)
    return (param.detach().float().view(-1) * weights.cos_().add_(1.5)).sum()
