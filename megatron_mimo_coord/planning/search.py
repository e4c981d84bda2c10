"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered (:func:`choices.choices`), with every
microbatch that divides the batch, on ranks of their own and colocated. Simulating all of them would
take hours. So the search goes best first (branch and bound): it begins with the choices of the
language model, each with what a step takes at least whatever the encoders are (:mod:`bounds`), and
always goes on with the branch whose bound is lowest. It adds one encoder after the other, as far as
it fits into memory, and simulates a layout once all modules are chosen. A branch's bound is made
tighter when its turn comes: by the GPUs that the remaining encoders need together, and by
simulating the modules that are chosen without the others. A layout is returned when its
time is the lowest of all times and bounds that are left. Nothing better is lost, for all that was
not simulated lies in a branch with a bound, and so a time, no better than those returned.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from heapq import heappop, heappush
from math import inf

from attrs import evolve, frozen

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    is_colocated,
    pack,
    ranks_taken,
)
from megatron_mimo_coord.planning.activations import stage_activations
from megatron_mimo_coord.planning.bounds import (
    Choice,
    LeastDurations,
    Load,
    colocated_bound,
    disjoint_bound,
    fastest,
)
from megatron_mimo_coord.planning.choices import (
    Room,
    choices,
    divisors,
    is_bridgeable,
    side_by_side,
)
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.memory import (
    StageMemory,
    layout_memory,
    rank_totals,
    stage_memory,
)
from megatron_mimo_coord.planning.model_states import least_states
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step, timeline_of
from megatron_mimo_coord.planning.timeline import Timeline


@frozen(kw_only=True)
class Task:
    """What a layout is sought for.

    Args:
        sizes: of each module.
        room: the GPUs and the batch.
        memory_bytes: of a GPU, for one rank.
        costs: what a module costs in a layout.
        cluster: the links between ranks.
        micro_batch_size: the only microbatch to consider, over all ranks; None for every one.
    """

    sizes: Mapping[str, ModuleSizes]
    room: Room
    memory_bytes: float
    costs: Callable[[str, ModuleParallelism], ModuleCosts]
    cluster: Cluster
    micro_batch_size: int | None = None

    def has_costs(self, name: str, parallelism: ModuleParallelism) -> bool:
        """Whether costs are known: those of unequal stages are of one number of stages."""
        return _has_stages(self.costs(name, parallelism), parallelism)

    @property
    def microbatches(self) -> list[int]:
        """Samples that a microbatch over all ranks may have."""
        if self.micro_batch_size is not None:
            return [self.micro_batch_size]
        return divisors(self.room.global_batch_size)

    @property
    def distributed_optimizer(self) -> bool:
        """Whether replicas share the optimizer's work, as far as all modules say so."""
        return all(sizes.use_distributed_optimizer for sizes in self.sizes.values())


@frozen(eq=False)
class Proposal:
    """A layout and what it costs.

    Args:
        modules: parallel sizes of each module, each with its first rank.
        micro_batch_size: samples in a microbatch over all ranks.
        room: the GPUs and the batch it was sought for.
        timeline: of a simulated step.
        memory: of a rank of each (module, stage).
        memory_bytes: of a GPU.
    """

    modules: Mapping[str, ModuleParallelism]
    micro_batch_size: int
    room: Room
    timeline: Timeline
    memory: Mapping[tuple[str, int], StageMemory]
    memory_bytes: float

    @property
    def grids(self) -> dict[str, ModuleGrid]:
        """Where each module lies."""
        return pack(self.modules)

    @property
    def is_colocated(self) -> bool:
        """Whether several modules share all ranks."""
        return len(self.modules) > 1 and is_colocated(self.grids.values())

    @property
    def num_microbatches(self) -> int:
        """Microbatches in a step."""
        return self.room.global_batch_size // self.micro_batch_size

    @property
    def gpus(self) -> int:
        """GPUs that the layout uses."""
        return ranks_taken(self.grids.values())

    @property
    def allocated(self) -> int:
        """GPUs of the nodes that it takes."""
        return self.room.allocated(self.gpus)

    @property
    def samples_per_second(self) -> float:
        """Of the whole job."""
        return self.room.global_batch_size / self.timeline.seconds

    @property
    def rank_memory(self) -> dict[tuple[str, int], float]:
        """Bytes on a rank of each (module, stage), with modules on the same ranks."""
        return rank_totals(self.grids, self.memory)

    @property
    def headroom(self) -> float:
        """Bytes that are left on the fullest GPU; below zero if the layout does not fit."""
        return self.memory_bytes - max(self.rank_memory.values())

    def idle(self, module: str) -> float:
        """Share of a step in which a rank of a module neither computes nor waits on a bridge."""
        return self._mean(module, "idle")

    def waiting(self, module: str) -> float:
        """Share of a step in which a rank of a module waits on a bridge."""
        return self._mean(module, "waiting")

    def ranks_idle(self, module: str) -> float:
        """Share of a step in which a rank of a module computes nothing, for this or another."""
        here = self.grids[module].ranks
        sharing = [name for name, grid in self.grids.items() if grid.ranks == here]
        return max(0.0, 1 - sum(self._mean(name, "busy") for name in sharing))

    def _mean(self, module: str, share: str) -> float:
        """A share of the step, of all stages of a module."""
        stages = self.timeline.stages.items()
        shares = [getattr(stage, share) for (name, _), stage in stages if name == module]
        return sum(shares) / len(shares)


def cost(task: Task, modules: Mapping[str, ModuleParallelism], micro_batch_size: int) -> Proposal:
    """What one layout costs, whether it fits or not.

    Raises:
        ValueError: the layout cannot run.
    """
    microbatches = task.room.global_batch_size // micro_batch_size
    timeline = simulate_step(
        modules,
        {name: task.costs(name, module) for name, module in modules.items()},
        micro_batch_size=micro_batch_size,
        num_microbatches=microbatches,
        cluster=task.cluster,
        distributed_optimizer=task.distributed_optimizer,
    )
    memory = _memory(task, modules, micro_batch_size)
    return Proposal(modules, micro_batch_size, task.room, timeline, memory, task.memory_bytes)


def _memory(
    task: Task, modules: Mapping[str, ModuleParallelism], micro_batch_size: int
) -> dict[tuple[str, int], StageMemory]:
    return layout_memory(
        modules,
        task.sizes,
        micro_batch_size=micro_batch_size,
        num_microbatches=task.room.global_batch_size // micro_batch_size,
    )


def propose(task: Task, count: int = 10, *, per_gpu: bool = False) -> list[Proposal]:
    """The layouts with the shortest steps, the shortest first; fewer than ``count`` if no more fit.

    Of equal ones those on fewer GPUs come first. Each layout is returned once, with its best
    microbatch.

    Args:
        task: what a layout is sought for.
        count: how many layouts are wanted.
        per_gpu: whether those are best that take the fewest seconds of GPUs that are allocated.
    """
    return Search(task, per_gpu=per_gpu).best(count)


@frozen(eq=False)
class Branch:
    """All layouts that have some modules in common.

    Args:
        chosen: a choice for the language model, and then for one encoder after the other.
        samples: of a microbatch, over all ranks.
        colocated: whether all modules are on the same ranks.
    """

    chosen: Mapping[str, Choice]
    samples: int
    colocated: bool

    @property
    def language(self) -> Choice:
        """That of the language model."""
        return self.chosen[LANGUAGE]

    @property
    def gpus(self) -> int:
        """Ranks that the chosen modules take."""
        sizes = [choice.gpus for choice in self.chosen.values()]
        return sizes[0] if self.colocated else sum(sizes)

    def modules(self, room: Room) -> dict[str, ModuleParallelism] | None:
        """The layout, each module with its first rank; None if it would tear TP groups apart."""
        names = [*(name for name in self.chosen if name != LANGUAGE), LANGUAGE]
        modules = {name: self.chosen[name].parallelism for name in names}
        if self.colocated:
            return {name: evolve(module, rank_offset=0) for name, module in modules.items()}
        return side_by_side(modules, room.gpus_per_node)


class Search:
    """The choices of a task, and what has been worked out of them."""

    def __init__(self, task: Task, *, per_gpu: bool = False) -> None:
        self.task = task
        self.per_gpu = per_gpu
        self.encoders = [name for name in task.sizes if name != LANGUAGE]
        self.disjoint = self._choices(receives=bool(self.encoders))
        self.colocated: dict[str, list[Choice]] = {}
        if self.encoders:
            frozen = all(
                choice.costs.frozen for name in self.encoders for choice in self.disjoint[name]
            )
            for name, found in self.disjoint.items():
                receives = name == LANGUAGE and not frozen
                alone = [choice for choice in found if choice.stages == 1]
                self.colocated[name] = [evolve(choice, receives=receives) for choice in alone]
        self._fastest = {name: _fastest_by_gpus(found) for name, found in self.disjoint.items()}
        self.is_complete = True
        self._load = cache(self._load)  # type: ignore[method-assign]
        self._held = cache(self._held)  # type: ignore[method-assign]
        self._pairs = cache(self._pairs)  # type: ignore[method-assign]
        self._pair_seconds = cache(self._pair_seconds)  # type: ignore[method-assign]
        self._steps = cache(self._steps)  # type: ignore[method-assign]

    def _choices(self, receives: bool) -> dict[str, list[Choice]]:
        task, cluster = self.task, fastest(self.task.cluster)
        found: dict[str, list[Choice]] = {}
        for name, sizes in task.sizes.items():
            found[name] = []
            for parallelism in choices(name, sizes, task.room):
                if least_memory(task, name, parallelism) > task.memory_bytes:
                    continue
                costs, shared = task.costs(name, parallelism), task.distributed_optimizer
                takes = receives and name == LANGUAGE
                if _has_stages(costs, parallelism):
                    found[name].append(Choice(name, parallelism, costs, cluster, takes, shared))
            found[name].sort(key=lambda choice: choice.gpus)
        return found

    def best(self, count: int, *, is_any_enough: bool = False, most: float = inf) -> list[Proposal]:
        """The layouts with the shortest steps.

        Args:
            count: how many.
            is_any_enough: whether to return the first layout that fits, alone.
            most: branches to look at; then :attr:`is_complete` is False.
        """
        found: dict[object, Proposal] = {}
        heap: list[tuple[float, int, int, Branch | Proposal, Inside | None]] = []
        looks = 0
        number = itertools.count()  # of equal ones the first comes first

        def push(least: float, first: Branch | Proposal, others: Inside | None = None) -> None:
            if least < inf:
                heappush(heap, (least, first.gpus, next(number), first, others))

        def push_next(others: Inside) -> None:
            for least, first in itertools.islice(others, 1):
                push(least, first, others)

        push_next(iter(self._roots()))
        while heap and len(found) < count:
            least, _, _, first, others = heappop(heap)
            if others is not None:
                looks += 1
                if looks > most:
                    self.is_complete = False
                    break
                push_next(others)
                push(max(least, self.least_cost(first)), first)
            elif isinstance(first, Proposal):
                found.setdefault(tuple(first.modules.items()), first)
            elif len(first.chosen) < len(self.task.sizes):
                push_next(iter(self._inside(first)))
            elif proposal := self._simulated(first):
                if is_any_enough:
                    return [proposal]
                push(self._cost(proposal.timeline.seconds, proposal.gpus), proposal)
        return list(found.values())

    def _cost(self, seconds: float, gpus: int) -> float:
        """What makes one layout better than another: seconds of a step, or of all its GPUs."""
        return seconds * self.task.room.allocated(gpus) if self.per_gpu else seconds

    def _roots(self) -> "list[Bounded]":
        """A branch for each choice of the language model and each microbatch, the best first."""
        roots: list[Bounded] = []
        for colocated, found in ((False, self.disjoint), (True, self.colocated)):
            for samples in self.task.microbatches:
                for language in found.get(LANGUAGE, ()):
                    if samples % language.replicas == 0:
                        branch = Branch({LANGUAGE: language}, samples, colocated)
                        roots.append((self._cost(self.bound(branch), branch.gpus), branch))
        return _sorted(roots)

    def _inside(self, branch: Branch) -> "list[Bounded]":
        """A branch for each choice of the next encoder, the best first."""
        name = self.encoders[len(branch.chosen) - 1]
        inside: list[Bounded] = []
        for seconds, choice in self._pairs(branch.language, branch.samples, branch.colocated, name):
            smaller = evolve(branch, chosen={**branch.chosen, name: choice})
            if smaller.gpus <= self.task.room.gpus:
                inside.append((self._cost(seconds, smaller.gpus), smaller))
        return _sorted(inside)

    def _pairs(
        self, language: Choice, samples: int, colocated: bool, name: str
    ) -> list[tuple[float, Choice]]:
        """The choices of an encoder that go with one of the language model, with their bounds."""
        pairs = []
        for choice in (self.colocated if colocated else self.disjoint)[name]:
            pair = Branch({LANGUAGE: language, name: choice}, samples, colocated)
            has_ranks = choice.gpus == language.gpus or not colocated
            if (
                (has_ranks and pair.gpus <= self.task.room.gpus)
                and samples % choice.replicas == 0
                and is_bridgeable(choice.parallelism, language.parallelism)
                and self._fits_memory(pair, stages=1)
            ):
                pairs.append((self._bound_of_chosen(pair), choice))
        return pairs

    def least_cost(self, branch: "Branch | Proposal") -> float:
        """What any layout of a branch costs at least; infinite if none fits."""
        assert isinstance(branch, Branch)
        if not self._fits_memory(branch):
            return inf
        seconds = self.bound(branch)
        if not branch.colocated and len(branch.chosen) > 1 and len(self.encoders) > 1:
            last = list(branch.chosen.values())[-1]
            seconds = max(seconds, self._pair_seconds(branch.language, last, branch.samples))
            if 2 < len(branch.chosen) <= len(self.encoders):
                seconds = max(seconds, self._seconds_of_chosen(branch.chosen, branch.samples))
        rest = tuple(self.encoders[len(branch.chosen) - 1 :])
        if branch.colocated or not rest:
            return self._cost(seconds, branch.gpus)
        spare = self.task.room.gpus - branch.gpus
        return min(
            (
                self._cost(max(seconds, least), branch.gpus + gpus)
                for least, gpus in self._steps(branch.language, branch.samples, rest)
                if gpus <= spare
            ),
            default=inf,
        )

    def _steps(
        self, language: Choice, samples: int, names: Sequence[str]
    ) -> list[tuple[float, int]]:
        """(seconds, the fewest GPUs with which some encoders together can be as fast)."""
        fewest: dict[str, int] = {}
        steps = []
        pairs = [
            (seconds, encoder, choice.gpus)
            for encoder in names
            for seconds, choice in self._pairs(language, samples, False, encoder)
        ]
        for seconds, name, gpus in sorted(pairs):
            if gpus < fewest.get(name, self.task.room.gpus + 1):
                fewest[name] = gpus
                if len(fewest) == len(names):
                    steps.append((seconds, sum(fewest.values())))
        return steps

    def bound(self, branch: Branch) -> float:
        """Seconds that a step takes at least in any layout of a branch; infinite if none fits."""
        seconds = self._bound_of_chosen(branch)
        spare = self.task.room.gpus - branch.gpus
        for name in () if branch.colocated else self.encoders[len(branch.chosen) - 1 :]:
            slowest = _at_most(self._fastest[name], spare)
            seconds = max(seconds, self.task.room.global_batch_size * slowest)
        return seconds

    def _bound_of_chosen(self, branch: Branch) -> float:
        microbatches = self._microbatches(branch.samples)
        if branch.colocated:
            return colocated_bound(branch.chosen, branch.samples, microbatches)
        loads = {name: self._load(choice, branch.samples) for name, choice in branch.chosen.items()}
        return disjoint_bound(branch.chosen, loads, branch.samples, microbatches)

    def _microbatches(self, samples: int) -> int:
        return self.task.room.global_batch_size // samples

    def _load(self, choice: Choice, samples: int) -> Load:
        return Load.of(choice, samples, self._microbatches(samples))

    def _pair_seconds(self, language: Choice, encoder: Choice, samples: int) -> float:
        return self._seconds_of_chosen({LANGUAGE: language, encoder.name: encoder}, samples)

    def _seconds_of_chosen(self, chosen: Mapping[str, Choice], samples: int) -> float:
        """A step without the other encoders, every message as fast as it can be anywhere."""
        durations = LeastDurations.of(chosen, samples)
        return timeline_of(durations, self._microbatches(samples)).seconds

    def _fits_memory(self, branch: Branch, stages: int | None = None) -> bool:
        """Whether the module that was chosen last fits on ranks of its own, or all on the same.

        Args:
            branch: all modules before the last fit.
            stages: how many to look at; None for all.
        """
        if branch.colocated:
            held = sum(self._held(each, branch.samples, 1) for each in branch.chosen.values())
            return held <= self.task.memory_bytes
        name, choice = list(branch.chosen.items())[-1]
        behind = choice.stages + (0 if name == LANGUAGE else branch.language.stages)
        return all(
            self._held(choice, branch.samples, behind - stage, stage) <= self.task.memory_bytes
            for stage in range(stages or choice.stages)
        )

    def _held(self, choice: Choice, samples: int, in_flight: int, stage: int = 0) -> float:
        """Bytes on a stage's rank with so many microbatches in flight, if a step has as many."""
        return stage_memory(
            choice.name,
            self.task.sizes,
            {choice.name: choice.parallelism},
            stage,
            micro_batch_size=samples,
            in_flight=min(self._microbatches(samples), in_flight),
        ).total

    def _simulated(self, branch: Branch) -> Proposal | None:
        """What a layout costs; None if it cannot be placed."""
        modules = branch.modules(self.task.room)
        return cost(self.task, modules, branch.samples) if modules else None


Bounded = tuple[float, Branch]
"""What a branch costs at least, and the branch."""

Inside = Iterator[Bounded]
"""What is inside a branch, the best first."""


def _has_stages(costs: ModuleCosts, parallelism: ModuleParallelism) -> bool:
    layers = costs.layers_per_stage
    return layers is None or len(layers) == parallelism.pipeline_model_parallel_size


def _sorted(branches: list[Bounded]) -> list[Bounded]:
    """The best first, of equal ones those on fewer GPUs."""
    return sorted(branches, key=lambda each: (each[0], each[1].gpus))


def _fastest_by_gpus(found: Sequence[Choice]) -> list[tuple[int, float]]:
    """(GPUs, seconds of a sample on the slowest stage) of the fastest on so many GPUs or fewer."""
    steps: list[tuple[int, float]] = []
    for choice in sorted(found, key=lambda choice: choice.gpus):
        if not steps or choice.slowest < steps[-1][1]:
            steps.append((choice.gpus, choice.slowest))
    return steps


def _at_most(steps: Sequence[tuple[int, float]], gpus: int) -> float:
    """Seconds of a sample on so many GPUs or fewer; infinite if they are too few."""
    index = bisect_right(steps, (gpus, inf))
    return steps[index - 1][1] if index else inf


def least_memory(task: Task, name: str, parallelism: ModuleParallelism) -> float:
    """What a module's fullest rank holds at least, whatever the rest of the layout is."""
    sizes, width = task.sizes[name], task.sizes[LANGUAGE].hidden_size
    stages = parallelism.pipeline_model_parallel_size
    microbatches = task.room.global_batch_size // parallelism.data_parallel_size
    held = 0.0
    for stage in {0, stages - 1}:
        in_flight = min(stages - stage, microbatches)
        kept = stage_activations(sizes, parallelism, stage, samples=1)
        if sizes.frozen and name != LANGUAGE and stage == 0:
            in_flight = 0
        states = least_states(sizes, parallelism, stage, width)
        held = max(held, states + in_flight * kept.saved + kept.working)
    return held
