"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered, with every microbatch that divides the batch,
on ranks of their own and colocated. All are ranked by a closed formula (:mod:`formula`); the best
hundred or so are simulated, and the best of these listed.
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice, product
from typing import Any

from attrs import evolve, frozen

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    modules_by_stage,
    pack,
    ranks_taken,
    runs_encoders_first,
    sharing,
)
from megatron_mimo_coord.planning.candidates import ALIKE, Candidate, Candidates
from megatron_mimo_coord.planning.choices import Request, recomputations, side_by_side
from megatron_mimo_coord.planning.memory import StageMemory, layout_memory, rank_totals
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step
from megatron_mimo_coord.planning.timeline import Timeline

MOST = 120  # layouts that are simulated, or three times as many as are wanted
MARGIN = 1.1  # how much longer than another a step may seem and yet be shorter


@frozen(eq=False, slots=False)
class Proposal:
    """A layout and, worked out when asked for, what it costs.

    Args:
        request: what it was sought for.
        sizes: of each module, with what it recomputes.
        modules: parallel sizes of each module, each with its first rank.
        micro_batch_size: samples in a microbatch over all ranks.
        how: ``encoders_first`` and ``encoder_microbatches``, as in :func:`simulate_step`.
    """

    request: Request
    sizes: Mapping[str, ModuleSizes]
    modules: Mapping[str, ModuleParallelism]
    micro_batch_size: int
    how: Mapping[str, Any]

    @classmethod
    def of(cls, request: Request, candidate: Candidate) -> "Proposal | None":
        """That of a candidate; None if no order of its modules keeps TP groups inside a node."""
        language, *encoders = candidate.choices
        chosen = {choice.name: choice for choice in (*encoders, language)}
        parallelisms = {name: choice.parallelism for name, choice in chosen.items()}
        modules = side_by_side(parallelisms)
        if candidate.shared:
            modules = {name: evolve(each, rank_offset=0) for name, each in parallelisms.items()}
        if modules is None:
            return None
        sizes = {name: choice.sizes for name, choice in chosen.items()}
        how = {"encoder_microbatches": candidate.encoder_microbatches}
        return cls(request, sizes, modules, candidate.samples, how)

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

    @property
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
    def kind(self) -> tuple[ModuleParallelism, int, bool, int]:
        """What layouts have in common that differ in encoders alone."""
        language = evolve(self.modules[LANGUAGE], rank_offset=None)
        return language, self.micro_batch_size, self.is_shared, self.allocated

    def is_like(self, faster: "Proposal") -> bool:
        """Whether this is another's layout, or differs in nothing that makes a step longer."""
        longest = (1 + ALIKE) * faster.timeline.seconds
        is_as_long = self.timeline.seconds <= longest
        return self.modules == faster.modules or (self.kind == faster.kind and is_as_long)

    def ranks_idle(self, module: str) -> float:
        """Share of a step in which a rank of a module computes nothing, for this or another."""
        stages = self.timeline.stages
        idle = [
            1 - sum(stages[name, stage].busy for name in names)
            for names, stage in modules_by_stage(self.grids)
            if module in names
        ]
        return max(0.0, sum(idle) / len(idle))


def cheapest(request: Request, modules: Mapping[str, ModuleParallelism], **how: Any) -> Proposal:
    """What one layout costs with the shortest step that fits; if none does, with the least memory.

    What is recomputed is chosen where the sizes do not say it.

    Raises:
        ValueError: the layout cannot run.
    """
    samples = request.micro_batch_size
    assert samples, "the batch is known"
    first = runs_encoders_first(pack(modules)) and how.get("encoders_first") is not False
    every = [
        Proposal(request, dict(zip(modules, way, strict=True)), modules, samples, {**how, **kept})
        for way in product(*(recomputations(request.sizes[name]) for name in modules))
        for kept in ([{}, {"encoder_microbatches": 0}] if first else [{}])
    ]
    fitting = [each for each in every if each.headroom >= 0]
    if fitting:
        return min(fitting, key=lambda each: each.timeline.seconds)
    return max(every, key=lambda each: each.headroom)


def propose(request: Request, count: int = 10, *, per_gpu: bool = False) -> list[Proposal]:
    """The layouts with the shortest steps, the shortest first; fewer than ``count`` if no more fit.

    Each layout is returned once, with its best microbatch. Of those on as many nodes that differ in
    encoders alone, and take equally long since these idle anyway, only the fastest is returned.

    Args:
        request: what a layout is sought for.
        count: how many layouts are wanted.
        per_gpu: whether those are best that take the fewest seconds of GPUs that are allocated.
    """

    def cost_of(seconds: float, gpus: int) -> float:
        return seconds * request.allocated(gpus) if per_gpu else seconds

    def rank(proposal: Proposal) -> tuple[float, int]:
        return cost_of(proposal.timeline.seconds, proposal.gpus), proposal.gpus

    found: list[Proposal] = []
    for candidate in islice(Candidates(request).best_first(cost_of), max(MOST, 3 * count)):
        listed = _apart(found, count)
        seems = cost_of(candidate.seconds, candidate.gpus)
        if len(listed) == count and seems > MARGIN * rank(listed[-1])[0]:
            break
        proposal = Proposal.of(request, candidate)
        if proposal and proposal.headroom >= 0:
            insort(found, proposal, key=rank)
    return _apart(found, count)


def _apart(found: Sequence[Proposal], count: int) -> list[Proposal]:
    """The first of some layouts, without those that are like a faster one."""
    kept: list[Proposal] = []
    for proposal in found:
        if len(kept) < count and not any(map(proposal.is_like, kept)):
            kept.append(proposal)
    return kept
