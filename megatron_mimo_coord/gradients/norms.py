"""How large each module's gradients are, and how many parameters have one.

Each element of a gradient is counted by one rank of the job. Replicas share the work: each looks at
its own part of every bucket, which with the distributed optimizer is the shard that it reduced. Of
parameters that several tensor-parallel ranks or pipeline stages hold, one copy counts, as in
Megatron's own norm.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.world.device import world_device


class CountedGradients:
    """The parts of the gradients of this rank's modules that no other rank counts.

    Args:
        names: all modules of the job, in one order on every rank.
        modules: those on this rank.
    """

    def __init__(self, names: Iterable[str], modules: Iterable[ModuleGradients]) -> None:
        self._names = list(names)
        self._counted = {
            module.name: list(module.ddp.disjoint_parts(module.pg_collection)) for module in modules
        }

    def norms(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """L2 norm of each module's gradients / ``scale``. Collective; no host sync."""
        squares = torch.zeros(len(self._names), dtype=torch.float64, device=world_device())
        for name, grads in self._counted.items():
            if grads:
                norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)) / scale
                squares[self._names.index(name)] = norms.double().square().sum()
        dist.all_reduce(squares)
        return dict(zip(self._names, squares.sqrt().float().unbind(), strict=True))

    def counts(self) -> dict[str, int]:
        """Trainable parameters of each module. Collective."""
        here = {name: sum(grad.numel() for grad in grads) for name, grads in self._counted.items()}
        counts = torch.tensor([here.get(name, 0) for name in self._names], device=world_device())
        dist.all_reduce(counts)
        return dict(zip(self._names, counts.tolist(), strict=True))
