"""A layout that is considered and, worked out when asked for, what it costs."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import permutations
from typing import Any

from attrs import evolve, frozen

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    modules_by_stage,
    pack,
    ranks_taken,
    sharing,
)
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.memory import PARTS, StageMemory, layout_memory, rank_totals
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step
from megatron_mimo_coord.planning.timeline import Timeline

ALIKE = 0.01
"""Steps that differ by a smaller part are equally long: no prediction is that exact."""
GB = 1e9


@frozen(eq=False, slots=False)
class Layout:
    """A layout that is considered and, worked out when asked for, what it costs.

    Args:
        request: what it was sought for.
        sizes: of each module, with what it recomputes.
        modules: parallel sizes of each module.
        micro_batch_size: samples in a microbatch over all ranks.
        how: ``encoders_first`` and ``encoder_microbatches``, as in :func:`simulate_step`.
        seconds: of a step, by the formula.
    """

    request: Request
    sizes: Mapping[str, ModuleSizes]
    modules: Mapping[str, ModuleParallelism]
    micro_batch_size: int
    how: Mapping[str, Any]
    seconds: float = 0.0

    @cached_property
    def timeline(self) -> Timeline:
        """Of a simulated step."""
        return self._simulated()

    @cached_property
    def seconds_in_slices(self) -> float:
        """Of a step without ``assign_images``."""
        return self._simulated(images_assigned=False).seconds

    def _simulated(self, **changed: Any) -> Timeline:
        costs = {
            name: evolve(self.request.costs(name, self.sizes[name], module), **changed)
            for name, module in self.modules.items()
        }
        return simulate_step(
            self.modules,
            costs,
            micro_batch_size=self.micro_batch_size,
            num_microbatches=self.num_microbatches,
            cluster=self.request.cluster,
            distributed_optimizer=self.request.distributed_optimizer,
            **self.how,
        )

    @cached_property
    def memory(self) -> dict[tuple[str, int], StageMemory]:
        """Of a rank of each (module, stage)."""
        return layout_memory(
            self.modules,
            self.sizes,
            micro_batch_size=self.micro_batch_size,
            num_microbatches=self.num_microbatches,
            **self.how,
        )

    @cached_property
    def rank_memory(self) -> dict[tuple[str, int], float]:
        """Bytes on a rank of each (module, stage), with modules on the same ranks."""
        return rank_totals(self.grids, self.memory)

    @property
    def headroom(self) -> float:
        """Bytes that are left on the fullest GPU; below zero if the layout does not fit."""
        return self.request.memory_bytes - max(self.rank_memory.values())

    @cached_property
    def grids(self) -> dict[str, ModuleGrid]:
        """Where each module lies."""
        return pack(self.modules)

    @property
    def is_shared(self) -> bool:
        """Whether encoders are on ranks of the language model."""
        return bool(sharing(self.grids))

    @property
    def num_microbatches(self) -> int:
        """Microbatches in a step."""
        return self.request.global_batch_size // self.micro_batch_size

    @cached_property
    def gpus(self) -> int:
        """GPUs that the layout uses."""
        return ranks_taken(self.grids.values())

    @property
    def allocated(self) -> int:
        """GPUs of the nodes that it takes."""
        return self.request.allocated(self.gpus)

    @property
    def samples_per_second(self) -> float:
        """Of the whole job."""
        return self.request.global_batch_size / self.timeline.seconds

    @cached_property
    def _kind(self) -> tuple[ModuleParallelism, int, bool, int]:
        """What layouts have in common that differ in encoders alone."""
        language = evolve(self.modules[LANGUAGE], rank_offset=None)
        return language, self.micro_batch_size, self.is_shared, self.allocated

    def is_like(self, faster: "Layout") -> bool:
        """Whether this is another layout, or differs from it in nothing that takes longer."""
        is_as_long = self.timeline.seconds <= (1 + ALIKE) * faster.timeline.seconds
        return self.modules == faster.modules or (self._kind == faster._kind and is_as_long)

    def ranks_idle(self, module: str) -> float:
        """Share of a step in which a rank of a module computes nothing, for this or another."""
        stages = self.timeline.stages
        idle = [
            1 - sum(stages[name, stage].busy for name in names)
            for names, stage in modules_by_stage(self.grids)
            if module in names
        ]
        return max(0.0, sum(idle) / len(idle))

    def shortages(self) -> Iterator[str]:
        """What the fullest rank of each module lacks, with the other modules on the same rank."""
        most, fullest = self.request.memory_bytes, dict[tuple[str, ...], tuple[float, int]]()
        for names, stage in modules_by_stage(self.grids):
            held = self.rank_memory[names[0], stage]
            fullest[*names,] = max(fullest.get((*names,), (0.0, 0)), (held, stage))
        for modules, (held, stage) in fullest.items():
            if held <= most:
                continue
            parts = [
                ", ".join(
                    f"{part} {getattr(self.memory[name, stage], part) / GB:.1f}" for part in PARTS
                )
                for name in modules
            ]
            who = f"{modules[0]} stage {stage} needs"
            if len(modules) > 1:
                who = f"{' and '.join(modules)} together need"
                parts = [f"{name} {part}" for name, part in zip(modules, parts, strict=True)]
            yield f"{who} {held / GB:.1f} GB of {most / GB:.1f} GB a GPU: {'; '.join(parts)}"

    def __str__(self) -> str:
        parts = []
        for name, module in self.modules.items():
            tp, cp, dp, pp = module.shape
            context = f" x CP {cp}" if cp > 1 else ""
            recomputed = self.sizes[name].recomputed
            again = f" recomputing {recomputed}" if recomputed else ""
            parts.append(f"{name} TP {tp}{context} x PP {pp} x DP {dp}{again}")
        return f"{', '.join(parts)}, with a microbatch of {self.micro_batch_size}"


def placed(
    modules: Mapping[str, ModuleParallelism], shared: bool = False
) -> dict[str, ModuleParallelism] | None:
    """Modules on the same ranks, or on ranks of their own, every TP group inside a node.

    Tried are all orders, first the one with larger modules before smaller ones: they then begin
    where nodes do. None if TP groups are whole in no order.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=2)
        >>> language = ModuleParallelism(tensor_model_parallel_size=4)
        >>> found = placed({"vision": vision, "language": language})
        >>> [module.rank_offset for module in found.values()]
        [4, 0]
    """
    if shared:
        return {name: evolve(module, rank_offset=0) for name, module in modules.items()}
    for order in permutations(sorted(modules, key=lambda name: -modules[name].size)):
        grids = pack({name: modules[name] for name in order})
        if not any(grid.rank_offset % grid.dim("tp") for grid in grids.values()):
            return {
                name: evolve(modules[name], rank_offset=grids[name].rank_offset) for name in modules
            }
    return None
