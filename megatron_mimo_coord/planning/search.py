"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered (:func:`choices.choices`), with every
microbatch that divides the batch, on ranks of their own and colocated. Simulating all of them would
take hours, so most are ruled out by :mod:`bounds`, which says what a step takes at least: the
search takes all layouts whose bound is below a limit, simulates them from the lowest bound on, and
stops when the next bound is no better than the times of as many layouts as are wanted. If there are
too few, it raises the limit and goes on. Nothing better is lost, for whatever was not simulated has
a bound, and so a time, no better than those of what is returned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import inf

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, ModuleParallelism, pack, ranks_taken
from megatron_mimo_coord.planning.activations import stage_activations
from megatron_mimo_coord.planning.bounds import (
    Choice,
    Load,
    colocated_bound,
    disjoint_bound,
    fastest,
)
from megatron_mimo_coord.planning.choices import Room, choices, divisors, side_by_side
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.memory import StageMemory, layout_memory, rank_totals
from megatron_mimo_coord.planning.model_states import least_states
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step
from megatron_mimo_coord.planning.timeline import Timeline

RAISE = 1.2  # of the limit, when too few layouts are below it


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


@frozen(slots=False)
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
    def num_microbatches(self) -> int:
        """Microbatches in a step."""
        return self.room.global_batch_size // self.micro_batch_size

    @property
    def ranks(self) -> int:
        """GPUs that the layout uses."""
        return ranks_taken(self.grids.values())

    @property
    def allocated(self) -> int:
        """GPUs of the nodes that it takes."""
        return self.room.allocated(self.ranks)

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

    def _mean(self, module: str, share: str) -> float:
        shares = [
            getattr(stage, share)
            for (name, _), stage in self.timeline.stages.items()
            if name == module
        ]
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


def propose(task: Task, count: int = 10) -> list[Proposal]:
    """The layouts with the shortest steps, the shortest first; fewer than ``count`` if no more fit.

    Layouts of the same step time come in the order of the GPUs that they allocate. Each layout is
    returned once, with its best microbatch.

    Args:
        task: what a layout is sought for.
        count: how many layouts are wanted.
    """
    return Search(task).best(count)


@frozen(eq=False)
class Candidate:
    """A layout that has not been simulated.

    Args:
        bound: seconds that a step takes at least.
        chosen: a choice for each module.
        micro_batch_size: samples in a microbatch over all ranks.
        colocated: whether all modules are on the same ranks.
    """

    bound: float
    chosen: Mapping[str, Choice]
    micro_batch_size: int
    colocated: bool

    @property
    def gpus(self) -> int:
        """Ranks that it takes."""
        sizes = [choice.gpus for choice in self.chosen.values()]
        return sizes[0] if self.colocated else sum(sizes)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other candidates."""
        return (*(choice.parallelism for choice in self.chosen.values()), self.colocated)

    def modules(self, gpus_per_node: int) -> dict[str, ModuleParallelism] | None:
        """The layout, each module with its first rank; None if it would tear TP groups apart."""
        modules = {name: choice.parallelism for name, choice in self.chosen.items()}
        if self.colocated:
            return {name: evolve(module, rank_offset=0) for name, module in modules.items()}
        return side_by_side(modules, gpus_per_node)


class Search:
    """The choices of a task, and what has been worked out of them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        encoders = [name for name in task.sizes if name != LANGUAGE]
        self.disjoint = self._choices(receives=bool(encoders))
        self.colocated: dict[str, list[Choice]] = {}
        if encoders:
            frozen = all(self._is_frozen(name) for name in encoders)
            self.colocated = self._choices(receives=not frozen, stages=1)
        self._loads: dict[tuple[Choice, int], Load] = {}

    def _is_frozen(self, name: str) -> bool:
        return all(choice.costs.frozen for choice in self.disjoint[name])

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
        return found

    def best(self, count: int) -> list[Proposal]:
        """The layouts with the shortest steps, each with its best microbatch."""
        found: dict[object, Proposal] = {}
        tried: set[object] = set()
        limit = self._least()
        while True:
            for candidate in sorted(
                self.candidates(limit), key=lambda each: (each.bound, each.gpus)
            ):
                if candidate.bound >= _last(found, count):
                    break
                attempt = (candidate.key, candidate.micro_batch_size)
                if attempt not in tried:
                    tried.add(attempt)
                    self._try(candidate, found)
            last = _last(found, count)
            if last <= limit or limit == inf:
                return sorted(found.values(), key=_order)[:count]
            above = limit * RAISE if limit < self._most() else inf
            limit = last if last < inf else above

    def _try(self, candidate: Candidate, found: dict[object, Proposal]) -> None:
        """Simulate a candidate if it fits, and keep it if it is the layout's best so far."""
        modules = candidate.modules(self.task.room.gpus_per_node)
        if modules is None:
            return
        memory = _memory(self.task, modules, candidate.micro_batch_size)
        if max(rank_totals(pack(modules), memory).values()) > self.task.memory_bytes:
            return
        proposal = cost(self.task, modules, candidate.micro_batch_size)
        before = found.get(candidate.key)
        if before is None or proposal.timeline.seconds < before.timeline.seconds:
            found[candidate.key] = proposal

    def _least(self) -> float:
        """What any step takes at least: all work, shared by all GPUs."""
        room = self.task.room
        work = [
            min((choice.slowest * choice.gpus for choice in found), default=0.0)
            for found in self.disjoint.values()
        ]
        return room.global_batch_size * sum(work) / room.gpus

    def _most(self) -> float:
        """Above this no limit leaves anything out that a higher one would not."""
        slowest = [choice.slowest for found in self.disjoint.values() for choice in found]
        return 1000 * self.task.room.global_batch_size * max(slowest, default=0.0)

    def candidates(self, limit: float) -> Iterator[Candidate]:
        """All layouts whose bound is at most a limit, with every microbatch."""
        batch = self.task.room.global_batch_size
        for samples in self.task.microbatches:
            yield from self._disjoint_candidates(samples, batch // samples, limit)
            yield from self._colocated_candidates(samples, batch // samples, limit)

    def _disjoint_candidates(
        self, samples: int, microbatches: int, limit: float
    ) -> Iterator[Candidate]:
        batch = samples * microbatches
        options: dict[str, list[tuple[Choice, Load]]] = {}
        for name, found in self.disjoint.items():
            options[name] = []
            for choice in found:
                if samples % choice.replicas or batch * choice.slowest > limit:
                    continue
                load = self._load(choice, samples, microbatches)
                if max(load.serial, load.reduced) + choice.optimizer <= limit:
                    options[name].append((choice, load))
            options[name].sort(key=lambda each: each[0].gpus)
        if not all(options.values()):
            return
        encoders = [name for name in options if name != LANGUAGE]
        least = {name: options[name][0][0].gpus for name in options}
        for language in options[LANGUAGE]:
            gpus = self.task.room.gpus - language[0].gpus
            for combined in _within(encoders, options, least, language[0].replicas, gpus):
                pairs = {**combined, LANGUAGE: language}
                chosen = {name: pairs[name][0] for name in self.disjoint}
                loads = {name: pairs[name][1] for name in self.disjoint}
                bound = disjoint_bound(chosen, loads, samples, microbatches)
                if bound <= limit:
                    yield Candidate(bound, chosen, samples, colocated=False)

    def _load(self, choice: Choice, samples: int, microbatches: int) -> Load:
        key = (choice, samples)
        if key not in self._loads:
            self._loads[key] = Load.of(choice, samples, microbatches)
        return self._loads[key]

    def _colocated_candidates(
        self, samples: int, microbatches: int, limit: float
    ) -> Iterator[Candidate]:
        by_gpus: dict[str, dict[int, list[Choice]]] = {}
        for name, found in self.colocated.items():
            by_gpus[name] = {}
            for choice in found:
                if samples % choice.replicas == 0:
                    by_gpus[name].setdefault(choice.gpus, []).append(choice)
        if not by_gpus:
            return
        for gpus, languages in by_gpus[LANGUAGE].items():
            encoders = [by_gpus[name].get(gpus, []) for name in by_gpus if name != LANGUAGE]
            for language in languages:
                alike = [
                    [each for each in found if _divide(each.replicas, language.replicas)]
                    for found in encoders
                ]
                for combined in product(*alike):
                    together = {choice.name: choice for choice in (*combined, language)}
                    chosen = {name: together[name] for name in self.colocated}
                    bound = colocated_bound(chosen, samples, microbatches)
                    if bound <= limit:
                        yield Candidate(bound, chosen, samples, colocated=True)


def _within(
    names: Sequence[str],
    options: Mapping[str, list[tuple[Choice, Load]]],
    least: Mapping[str, int],
    replicas: int,
    gpus: int,
) -> Iterator[dict[str, tuple[Choice, Load]]]:
    """Combinations of encoders on so many GPUs, whose DP goes with that of the language model."""
    if not names:
        if gpus >= 0:
            yield {}
        return
    first, *others = names
    spare = gpus - sum(least[name] for name in others)
    for option in options[first]:
        if option[0].gpus > spare:
            return
        if _divide(option[0].replicas, replicas):
            for rest in _within(others, options, least, replicas, gpus - option[0].gpus):
                yield {first: option, **rest}


def _divide(left: int, right: int) -> bool:
    """Whether one of two numbers divides the other."""
    return max(left, right) % min(left, right) == 0


def _order(proposal: Proposal) -> tuple[float, int, int]:
    """Shortest step first; of the same, the one with fewer GPUs."""
    return proposal.timeline.seconds, proposal.allocated, proposal.ranks


def _last(found: Mapping[object, Proposal], count: int) -> float:
    """Seconds of the last layout that is wanted; infinite while there are too few."""
    times = sorted(proposal.timeline.seconds for proposal in found.values())
    return times[count - 1] if len(times) >= count else inf


def least_memory(task: Task, name: str, parallelism: ModuleParallelism) -> float:
    """What a module's fullest rank holds at least, whatever the rest of the layout is."""
    sizes, width = task.sizes[name], task.sizes[LANGUAGE].hidden_size
    stages = parallelism.pipeline_model_parallel_size
    held = 0.0
    for stage in {0, stages - 1}:
        in_flight = min(
            stages - stage, task.room.global_batch_size // parallelism.data_parallel_size
        )
        kept = stage_activations(sizes, parallelism, stage, samples=1)
        if sizes.frozen and name != LANGUAGE and stage == 0:
            in_flight = 0
        states = least_states(sizes, parallelism, stage, width)
        held = max(held, states + in_flight * kept.saved + kept.working)
    return held
