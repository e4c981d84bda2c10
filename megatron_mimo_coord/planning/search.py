"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered, with every microbatch that divides the batch,
on ranks of their own and colocated. All are ranked by a closed formula (:mod:`formula`); the best
hundred or so are simulated, and the best of these listed.
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any

from attrs import evolve, frozen

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    is_colocated,
    modules_by_stage,
    pack,
    ranks_taken,
    runs_encoders_first,
    sharing,
)
from megatron_mimo_coord.planning.candidates import ALIKE, Candidate, Candidates
from megatron_mimo_coord.planning.choices import Request, recomputations
from megatron_mimo_coord.planning.costs import ModuleCosts
from megatron_mimo_coord.planning.memory import StageMemory, layout_memory, rank_totals
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step
from megatron_mimo_coord.planning.timeline import Timeline

MOST = 120  # layouts that are simulated, or three times as many as are wanted
MARGIN = 1.1  # how much longer than another a step may seem and yet be shorter


@frozen(eq=False)
class Proposal:
    """A layout and what it costs.

    Args:
        request: what it was sought for.
        sizes: of each module, with what it recomputes.
        modules: parallel sizes of each module, each with its first rank.
        micro_batch_size: samples in a microbatch over all ranks.
        timeline: of a simulated step.
        memory: of a rank of each (module, stage).
        seconds_in_slices: of a step without ``assign_images``.
        how: ``encoders_first`` and ``encoder_microbatches``, as in :func:`simulate_step`.
    """

    request: Request
    sizes: Mapping[str, ModuleSizes]
    modules: Mapping[str, ModuleParallelism]
    micro_batch_size: int
    timeline: Timeline
    memory: Mapping[tuple[str, int], StageMemory]
    seconds_in_slices: float
    how: Mapping[str, Any]

    def again(self, request: Request) -> "Proposal":
        """The same layout for another request."""
        return cost(request, self.modules, self.micro_batch_size, self.sizes, **self.how)

    @property
    def grids(self) -> dict[str, ModuleGrid]:
        """Where each module lies."""
        return pack(self.modules)

    @property
    def is_colocated(self) -> bool:
        """Whether several modules share all ranks."""
        return len(self.modules) > 1 and is_colocated(self.grids.values())

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

    @property
    def rank_memory(self) -> dict[tuple[str, int], float]:
        """Bytes on a rank of each (module, stage), with modules on the same ranks."""
        return rank_totals(self.grids, self.memory)

    @property
    def headroom(self) -> float:
        """Bytes that are left on the fullest GPU; below zero if the layout does not fit."""
        return self.request.memory_bytes - max(self.rank_memory.values())

    def ranks_idle(self, module: str) -> float:
        """Share of a step in which a rank of a module computes nothing, for this or another."""
        stages = self.timeline.stages
        idle = [
            1 - sum(stages[name, stage].busy for name in names)
            for names, stage in modules_by_stage(self.grids)
            if module in names
        ]
        return max(0.0, sum(idle) / len(idle))


def cost(
    request: Request,
    modules: Mapping[str, ModuleParallelism],
    micro_batch_size: int,
    sizes: Mapping[str, ModuleSizes] | None = None,
    **how: Any,
) -> Proposal:
    """What one layout costs, whether it fits or not.

    Args:
        request: what the layout is for.
        modules: parallel sizes of each module.
        micro_batch_size: samples in a microbatch over all ranks.
        sizes: of each module, with what it recomputes; None for those of the request.
        how: ``encoders_first`` and ``encoder_microbatches``, as in :func:`simulate_step`.

    Raises:
        ValueError: the layout cannot run.
    """
    sizes = request.sizes if sizes is None else sizes
    number = request.global_batch_size // micro_batch_size
    batch: dict[str, Any] = {"micro_batch_size": micro_batch_size, "num_microbatches": number}
    costs = {name: request.costs(name, sizes[name], module) for name, module in modules.items()}

    def simulated(costs: Mapping[str, ModuleCosts]) -> Timeline:
        return simulate_step(
            modules,
            costs,
            **batch,
            **how,
            cluster=request.cluster,
            distributed_optimizer=request.distributed_optimizer,
        )

    slices = {
        name: evolve(each, images_assigned=each.images_assigned and not each.is_uneven)
        for name, each in costs.items()
    }
    timeline = simulated(costs)
    return Proposal(
        request,
        sizes,
        modules,
        micro_batch_size,
        timeline,
        layout_memory(modules, sizes, **batch, **how),
        timeline.seconds if slices == costs else simulated(slices).seconds,
        how,
    )


def cheapest(request: Request, modules: Mapping[str, ModuleParallelism], **how: Any) -> Proposal:
    """What one layout costs with the shortest step that fits; if none does, with the least memory.

    What is recomputed is chosen where the sizes do not say it.
    """
    assert request.micro_batch_size, "the batch is known"
    ways = [recomputations(request.sizes[name]) for name in modules]
    first = runs_encoders_first(pack(modules)) and how.get("encoders_first") is not False
    every = [
        cost(
            request,
            modules,
            request.micro_batch_size,
            dict(zip(modules, way, strict=True)),
            **how,
            **kept,
        )
        for way in product(*ways)
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
        listed = _apart(found, count) if len(found) >= count else []
        seems = cost_of(candidate.seconds, candidate.gpus)
        if len(listed) == count and seems > MARGIN * rank(listed[-1])[0]:
            break
        if candidate.modules and (proposal := costed(request, candidate)).headroom >= 0:
            insort(found, proposal, key=rank)
    return _apart(found, count)


def _apart(found: Sequence[Proposal], count: int) -> list[Proposal]:
    """The first of some layouts of which no two are alike."""
    kept: list[Proposal] = []
    for proposal in found:
        if len(kept) < count and not any(_are_alike(proposal, each) for each in kept):
            kept.append(proposal)
    return kept


def costed(request: Request, candidate: Candidate) -> Proposal:
    """What a candidate costs."""
    chosen = {choice.name: choice.sizes for choice in candidate.choices}
    modules, kept = candidate.modules, candidate.encoder_microbatches
    assert modules, "it can be placed"
    sizes = {name: chosen[name] for name in modules}
    return cost(request, modules, candidate.samples, sizes, encoder_microbatches=kept)


def _are_alike(one: Proposal, other: Proposal) -> bool:
    """Whether two layouts are one, or differ in nothing that makes a step longer."""
    if one.modules == other.modules:
        return True
    seconds = one.timeline.seconds, other.timeline.seconds
    what = [
        (
            evolve(each.modules[LANGUAGE], rank_offset=0),
            each.micro_batch_size,
            each.is_shared,
            each.allocated,
        )
        for each in (one, other)
    ]
    return what[0] == what[1] and max(seconds) <= (1 + ALIKE) * min(seconds)
