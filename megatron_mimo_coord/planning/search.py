"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered (:func:`choices.choices`), with every
microbatch that divides the batch, on ranks of their own and colocated. Simulating all of them would
take hours. So the search goes best first (branch and bound): it begins with the choices of the
language model, each with what a step takes at least whatever the encoders are (:mod:`bounds`), and
always goes on with the branch whose bound is lowest. It adds one encoder after the other, and
simulates a layout once all modules are chosen and fit into memory. A layout is returned when its
time is the lowest of all times and bounds that are left. Nothing better is lost, for all that was
not simulated lies in a branch with a bound, and so a time, no better than those returned.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from megatron_mimo_coord.planning.simulation import simulate_step
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
        layers = self.costs(name, parallelism).layers_per_stage
        return layers is None or len(layers) == parallelism.pipeline_model_parallel_size

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
            self.colocated = self._choices(receives=not frozen, stages=1)
        self._loads: dict[tuple[Choice, int], Load] = {}
        self._fits: dict[tuple[Choice, int, int], bool] = {}
        self._fastest = {name: _fastest_by_gpus(found) for name, found in self.disjoint.items()}

    def _choices(self, receives: bool, stages: int | None = None) -> dict[str, list[Choice]]:
        task, cluster = self.task, fastest(self.task.cluster)
        found = {}
        for name, sizes in task.sizes.items():
            found[name] = [
                Choice(
                    name,
                    parallelism,
                    task.costs(name, parallelism),
                    cluster,
                    receives and name == LANGUAGE,
                    task.distributed_optimizer,
                )
                for parallelism in choices(name, sizes, task.room)
                if stages in (None, parallelism.pipeline_model_parallel_size)
                and task.has_costs(name, parallelism)
                and least_memory(task, name, parallelism) <= task.memory_bytes
            ]
            found[name].sort(key=lambda choice: choice.gpus)
        return found

    def best(self, count: int) -> list[Proposal]:
        """The layouts with the shortest steps."""
        found: dict[object, Proposal] = {}
        heap: list[tuple[float, int, int, Branch | Proposal]] = []
        number = itertools.count()  # of equal ones the first comes first
        for seconds, branch in self._roots():
            least = self._cost(seconds, branch.gpus)
            heappush(heap, (least, branch.gpus, next(number), branch))
        while heap and len(found) < count:
            least, _, _, first = heappop(heap)
            if isinstance(first, Proposal):
                found.setdefault(tuple(first.modules.items()), first)
                continue
            for seconds, inside in self._opened(first):
                more = max(least, self._cost(seconds, inside.gpus))
                heappush(heap, (more, inside.gpus, next(number), inside))
        return list(found.values())

    def _cost(self, seconds: float, gpus: int) -> float:
        """What makes one layout better than another: seconds of a step, or of all its GPUs."""
        return seconds * self.task.room.allocated(gpus) if self.per_gpu else seconds

    def _roots(self) -> Iterator[tuple[float, Branch]]:
        """A branch for each choice of the language model and each microbatch."""
        for colocated, found in ((False, self.disjoint), (True, self.colocated)):
            for samples in self.task.microbatches:
                for language in found.get(LANGUAGE, ()):
                    if samples % language.replicas == 0:
                        branch = Branch({LANGUAGE: language}, samples, colocated)
                        if (bound := self.bound(branch)) < inf:
                            yield bound, branch

    def _opened(self, branch: Branch) -> Iterator[tuple[float, "Branch | Proposal"]]:
        """What is inside a branch, with its bounds: smaller branches, or a layout and its time."""
        if not branch.colocated and not self._fits_memory(branch):
            return
        if len(branch.chosen) == len(self.task.sizes):
            proposal = self._simulated(branch)
            if proposal is not None:
                yield proposal.timeline.seconds, proposal
            return
        for inside in self.smaller(branch):
            if (least := self.bound(inside)) < inf:
                yield least, inside

    def smaller(self, branch: Branch) -> Iterator[Branch]:
        """A branch for each choice of the next encoder."""
        name = self.encoders[len(branch.chosen) - 1]
        language = branch.chosen[LANGUAGE].parallelism
        for choice in (self.colocated if branch.colocated else self.disjoint)[name]:
            if branch.colocated and choice.gpus != branch.gpus:
                continue
            if not branch.colocated and branch.gpus + choice.gpus > self.task.room.gpus:
                return  # the others are larger still
            if branch.samples % choice.replicas == 0 and is_bridgeable(
                choice.parallelism, language
            ):
                yield evolve(branch, chosen={**branch.chosen, name: choice})

    def bound(self, branch: Branch) -> float:
        """Seconds that a step takes at least in any layout of a branch; infinite if none fits."""
        microbatches = self._microbatches(branch)
        if branch.colocated:
            return colocated_bound(branch.chosen, branch.samples, microbatches)
        loads = {name: self._load(choice, branch.samples) for name, choice in branch.chosen.items()}
        seconds = disjoint_bound(branch.chosen, loads, branch.samples, microbatches)
        spare = self.task.room.gpus - branch.gpus
        for name in self.encoders[len(branch.chosen) - 1 :]:
            slowest = _at_most(self._fastest[name], spare)
            seconds = max(seconds, self.task.room.global_batch_size * slowest)
        return seconds

    def _microbatches(self, branch: Branch) -> int:
        return self.task.room.global_batch_size // branch.samples

    def _load(self, choice: Choice, samples: int) -> Load:
        key = (choice, samples)
        if key not in self._loads:
            microbatches = self.task.room.global_batch_size // samples
            self._loads[key] = Load.of(choice, samples, microbatches)
        return self._loads[key]

    def _fits_memory(self, branch: Branch) -> bool:
        """Whether the module that was chosen last fits, on ranks of its own."""
        name, choice = list(branch.chosen.items())[-1]
        behind = 0 if name == LANGUAGE else branch.chosen[LANGUAGE].stages
        key = (choice, branch.samples, behind)
        if key not in self._fits:
            self._fits[key] = all(
                stage_memory(
                    name,
                    self.task.sizes,
                    {name: choice.parallelism},
                    stage,
                    micro_batch_size=branch.samples,
                    in_flight=min(self._microbatches(branch), choice.stages - stage + behind),
                ).total
                <= self.task.memory_bytes
                for stage in range(choice.stages)
            )
        return self._fits[key]

    def _simulated(self, branch: Branch) -> Proposal | None:
        """What a layout costs; None if it cannot be placed or does not fit."""
        modules = branch.modules(self.task.room)
        if modules is None:
            return None
        if branch.colocated:
            memory = _memory(self.task, modules, branch.samples)
            if max(rank_totals(pack(modules), memory).values()) > self.task.memory_bytes:
                return None
        return cost(self.task, modules, branch.samples)


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
