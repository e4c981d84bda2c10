"""Finds the layouts with the shortest steps among all that fit into the GPUs and their memory.

Every combination of sizes that divide is considered, with every microbatch that divides the batch,
on ranks of their own and colocated. All are ranked by a closed formula (:mod:`formula`); the best
hundred or so are simulated, and the best of these listed.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain, islice, product
from math import inf
from operator import add
from typing import Any, NamedTuple

from attrs import evolve

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism, pack, runs_encoders_first
from megatron_mimo_coord.planning.choices import (
    Choice,
    Request,
    choices,
    divisors,
    recomputations,
)
from megatron_mimo_coord.planning.durations import Durations
from megatron_mimo_coord.planning.formula import pipeline_seconds, stages, turn_seconds
from megatron_mimo_coord.planning.layouts import ALIKE, Layout, placed

MOST = 120  # layouts that are simulated, or three times as many as are wanted
MARGIN = 1.1  # how much longer than another a step may seem and yet be shorter
MOST_NODES = 2**13  # that are looked at for how many would do
MOST_STEPS = 4_000  # of a percent, from the memory that there is to what a layout needs

Combination = tuple[float, float, tuple[Choice, ...]]
"""Choices for some modules: (seconds, GPUs or bytes that they take, choices)."""


class Start(NamedTuple):
    """A language model that encoders are sought for.

    Args:
        seconds: of a step, at least.
        gpus: of the language model.
        language: how it is laid out.
        samples: of a microbatch, over all ranks.
        shared: whether encoders are to be on its ranks.
    """

    seconds: float
    gpus: int
    language: Choice
    samples: int
    shared: bool

    @property
    def encoders_first(self) -> bool:
        """Whether encoders run before the language model's pipeline."""
        return self.shared and self.language.stages > 1


class Candidates:
    """The layouts of a request that fit and that no other beats, by the formula.

    Of encoders that go with one language model only those are looked at that are faster than all on
    fewer GPUs (on shared ranks: with less memory).

    Args:
        request: what a layout is sought for.
        ways: to lay out each module, on as many GPUs at least.
    """

    def __init__(self, request: Request, ways: Mapping[str, Sequence[Choice]]) -> None:
        self.request, self.ways = request, ways

    def __iter__(self) -> Iterator[Layout]:
        return chain.from_iterable(map(self._layouts, self._starts()))

    def best_first(self, rank: Callable[[float, int], tuple[float, int]]) -> Iterator[Layout]:
        """The layouts, those that seem to be better before others.

        Args:
            rank: what (seconds, GPUs) cost; more of either costs no less.
        """

        def seems(of: Start | Layout) -> tuple[float, int]:
            return rank(of.seconds, of.gpus)

        found: list[Layout] = []
        for start in sorted(self._starts(), key=seems):
            while found and seems(found[0]) <= seems(start):
                yield found.pop(0)  # encoders, and what is recomputed, only add to a start
            for layout in self._layouts(start):
                insort(found, layout, key=seems)
        yield from found

    @cache  # noqa: B019 - a search is over when its command is
    def _fitting(self, name: str) -> list[Choice]:
        """Choices that fit alone, with the smallest microbatch: what a layout adds takes more."""
        gpus, most = self.request.gpus, self.request.memory_bytes
        return [
            choice
            for choice in self.ways[name]
            if choice.gpus <= gpus
            and any(way.held(choice.replicas) <= most for way in choice.ways[::-1])
        ]

    @cached_property
    def _encoding(self) -> float:
        """Seconds of all encoders on a GPU, for the samples of a step, at least."""

        def of(choice: Choice) -> float:
            work, _ = stages(self._durations(self.request.global_batch_size, choice), choice.name)
            return sum(work) * choice.gpus / choice.stages

        fitting = map(self._fitting, self.request.encoders)
        return sum(min(map(of, ways), default=0.0) for ways in fitting)

    def _starts(self) -> Iterator[Start]:
        """The language model in each layout, with each microbatch; perhaps it fits.

        The step is at least as long: all GPUs that encoders may be on share their work.
        """
        request, batch = self.request, self.request.global_batch_size
        only = request.micro_batch_size
        for samples in [only] if only else divisors(batch):
            for language in self._fitting(LANGUAGE):
                if samples % language.replicas:
                    continue
                gpus, others = language.gpus, request.gpus - language.gpus
                alone = pipeline_seconds(self._durations(samples, language), batch // samples)
                if not request.encoders or others:
                    least = max(alone, self._encoding / others) if others else alone
                    yield Start(least, gpus, language, samples, shared=False)
                if request.encoders:
                    yield Start(alone + self._encoding / gpus, gpus, language, samples, shared=True)

    def _layouts(self, start: Start) -> Iterator[Layout]:
        """With as little recomputation as fits; those that are slower are on fewer nodes."""
        request = self.request
        for kept in [None, 0] if start.encoders_first else [None]:
            combined = (self._combined(start, way, kept) for way in start.language.ways)
            least, rented = 0.0, inf
            for seconds, taken, (language, *encoders) in next(filter(None, combined), []):
                allocated = request.allocated(start.gpus if start.shared else int(taken))
                if seconds <= least * (1 + ALIKE) and allocated >= rented:
                    continue
                least, rented = seconds, allocated
                chosen = {each.name: each for each in (*encoders, language)}
                modules = {name: each.parallelism for name, each in chosen.items()}
                if lying := placed(modules, start.shared):
                    sizes = {name: each.sizes for name, each in chosen.items()}
                    how = {"encoder_microbatches": kept}
                    yield Layout(request, sizes, lying, start.samples, how, seconds)

    def _combined(self, start: Start, language: Choice, kept: int | None) -> list[Combination]:
        """Choices for all encoders that fit beside one for the language model."""
        request, samples = self.request, start.samples
        number = request.global_batch_size // samples
        held = language.held(samples, waiting=number if start.encoders_first else 0)
        if held > request.memory_bytes:
            return []
        seconds = pipeline_seconds(self._durations(samples, language), number)
        found: list[Combination] = [(seconds, held if start.shared else start.gpus, (language,))]
        combine: Callable[[float, float], float] = add if start.shared else max
        most = request.memory_bytes if start.shared else request.gpus
        for name in request.encoders:
            options = self._options(name, start, language, kept)
            found = _front(
                (combine(seconds, more), taken + takes, chosen + choice)
                for seconds, taken, chosen in found
                for more, takes, choice in options
                if taken + takes <= most
            )
        return found

    def _options(
        self, name: str, start: Start, language: Choice, kept: int | None
    ) -> list[Combination]:
        """Ways to lay out an encoder: on the language model's ranks, or on GPUs of its own."""
        found: list[Combination] = []
        request, samples, repeated = self.request, start.samples, kept is not None
        number = request.global_batch_size // samples
        beside = 0 if repeated or not start.encoders_first else number - 1
        of_stage, fastest = language.gpus // language.stages, inf
        room = language.gpus if start.shared else request.gpus - language.gpus
        for encoder in self._fitting(name):
            few, many = sorted((encoder.replicas, language.replicas))
            if encoder.gpus > room or samples % encoder.replicas or many % few:
                continue
            if start.shared and (encoder.stages > 1 or encoder.gpus % of_stage):
                continue
            for way in encoder.ways:
                step = self._durations(samples, language, way, shared=start.shared)
                if start.shared:
                    seconds = turn_seconds(step, number, name, repeated)
                    found.append((seconds, way.held(samples, beside), (way,)))
                elif (seconds := pipeline_seconds(step, number, name)) >= fastest:
                    break  # those with fewer GPUs are as fast
                elif way.held(samples, language.stages) <= request.memory_bytes:
                    found.append((seconds, way.gpus, (way,)))
                    fastest = seconds
                    break
        return _front(found)

    def _durations(self, samples: int, *chosen: Choice, shared: bool = False) -> Durations:
        modules, request = {each.name: each.parallelism for each in chosen}, self.request
        grids = pack(modules)
        if shared:
            grids = {name: evolve(grid, rank_offset=0) for name, grid in grids.items()}
        costs = {each.name: each.costs for each in chosen}
        is_distributed = request.distributed_optimizer
        return Durations(modules, grids, costs, request.cluster, samples, is_distributed)


def _front(combinations: Iterable[Combination]) -> list[Combination]:
    """The fastest first; each next is slower and takes less."""
    least, kept = inf, []
    for combination in sorted(combinations, key=lambda each: each[:2]):
        if combination[1] < least:
            least = combination[1]
            kept.append(combination)
    return kept


def cheapest(request: Request, modules: Mapping[str, ModuleParallelism], **how: Any) -> Layout:
    """What one layout costs with the shortest step that fits; if none does, with the least memory.

    What is recomputed is chosen where the sizes do not say it.

    Raises:
        ValueError: the layout cannot run.
    """
    samples = request.micro_batch_size
    assert samples, "the batch is known"
    first = runs_encoders_first(pack(modules)) and how.get("encoders_first") is not False
    every = [
        Layout(request, dict(zip(modules, way, strict=True)), modules, samples, {**how, **kept})
        for way in product(*(recomputations(request.sizes[name]) for name in modules))
        for kept in ([{}, {"encoder_microbatches": 0}] if first else [{}])
    ]
    fitting = [each for each in every if each.headroom >= 0]
    if fitting:
        return min(fitting, key=lambda each: each.timeline.seconds)
    return max(every, key=lambda each: each.headroom)


def propose(request: Request, count: int = 10, *, per_gpu: bool = False) -> list[Layout]:
    """The layouts with the shortest steps, the shortest first; fewer than ``count`` if no more fit.

    Each layout is returned once, with its best microbatch. Of those on as many nodes that differ in
    encoders alone, and take equally long since these idle anyway, only the fastest is returned.

    Args:
        request: what a layout is sought for.
        count: how many layouts are wanted.
        per_gpu: whether those are best that take the fewest seconds of GPUs that are allocated.
    """

    def rank(seconds: float, gpus: int) -> tuple[float, int]:
        return seconds * request.allocated(gpus) if per_gpu else seconds, gpus

    def simulated(layout: Layout) -> tuple[float, int]:
        return rank(layout.timeline.seconds, layout.gpus)

    found: list[Layout] = []
    ways = {name: choices(request, name) for name in request.sizes}
    for layout in islice(Candidates(request, ways).best_first(rank), max(MOST, 3 * count)):
        listed = _apart(found, count)
        seems, _ = rank(layout.seconds, layout.gpus)
        if len(listed) == count and seems > MARGIN * simulated(listed[-1])[0]:
            break
        if layout.headroom >= 0:
            insort(found, layout, key=simulated)
    return _apart(found, count)


def _apart(found: Sequence[Layout], count: int) -> list[Layout]:
    """The first of some layouts, without those that are like a faster one."""
    kept: list[Layout] = []
    for layout in found:
        if len(kept) < count and not any(map(layout.is_like, kept)):
            kept.append(layout)
    return kept


def closest(request: Request) -> tuple[Layout | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """
    nodes = -(-request.gpus // request.gpus_per_node)
    most = evolve(request, gpus=max(MOST_NODES, nodes) * request.gpus_per_node)
    ways = {name: choices(most, name) for name in request.sizes}

    def first(**changed: Any) -> Layout | None:
        """Some layout that fits something else, if any does; its step is not simulated."""
        found = next(iter(Candidates(evolve(request, **changed), ways)), None)
        return found and evolve(found, request=request)

    def with_more(percents: int) -> Layout | None:
        return first(memory_bytes=request.memory_bytes * 1.01**percents)

    def on(nodes: int) -> Layout | None:
        return first(gpus=nodes * request.gpus_per_node)

    said = []
    percents = bisect_left(range(MOST_STEPS), True, key=lambda each: bool(with_more(each)))
    if layout := with_more(percents):
        said += [f"closest is {layout}", *layout.shortages()]
    else:
        said.append(
            f"no combination of TP, PP and DP that divides the modules and the batch takes "
            f"{request.gpus} GPUs or fewer"
        )
    nodes += bisect_left(range(nodes, MOST_NODES), True, key=lambda each: bool(on(each)))
    gpus = nodes * request.gpus_per_node
    if fit := on(nodes):
        said.append(f"{gpus:,} GPUs would do: {fit}")
    else:
        said.append(
            f"{gpus:,} GPUs would not do either: use the distributed optimizer, or rent GPUs with "
            f"more memory"
        )
    return layout, said
