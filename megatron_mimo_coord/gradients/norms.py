"""How large each module's gradients are, and how many parameters have one.

Each element of a gradient is counted by one rank of the job. Replicas share the work: each looks at
its own part of every bucket, which with the distributed optimizer is the shard that it reduced. Of
parameters that several tensor-parallel ranks or pipeline stages hold, one copy counts, as in
Megatron's own norm.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.world.device import world_device


def grad_norms(
    names: Iterable[str], modules: Mapping[str, ModuleGradients], scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """L2 norm of each module's gradients / ``scale``. Collective; no host sync.

    Args:
        names: all modules of the job, in one order on every rank.
        modules: those on this rank.
        scale: a tensor without dims.
    """
    index = {name: each for each, name in enumerate(names)}
    squares = torch.zeros(len(index), dtype=torch.float64, device=world_device())
    for name, module in modules.items():
        if module.counted:
            norms = torch.stack(torch._foreach_norm(module.counted, 2, dtype=torch.float32)) / scale
            squares[index[name]] = norms.double().square().sum()
    dist.all_reduce(squares)
    return dict(zip(index, squares.sqrt().float().unbind(), strict=True))


def num_parameters(names: Iterable[str], modules: Mapping[str, ModuleGradients]) -> dict[str, int]:
    """Trainable parameters of each module, by the same arguments. Collective."""
    here = {name: sum(grad.numel() for grad in each.counted) for name, each in modules.items()}
    counts = torch.tensor([here.get(name, 0) for name in names], device=world_device())
    dist.all_reduce(counts)
    return dict(zip(names, counts.tolist(), strict=True))
