"""Where no layout fits: which comes closest, what it lacks, and how many GPUs would do."""

from bisect import bisect_left
from collections.abc import Iterator
from math import inf

from attrs import evolve

from megatron_mimo_coord.planning.candidates import Candidate, Candidates
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.memory import PARTS
from megatron_mimo_coord.planning.search import Proposal, costed

MOST_NODES = 2**13  # that are looked at for how many would do
MOST_STEPS = 4_000  # of a percent, from the memory that there is to what a layout needs
GB = 1e9


def _first(request: Request) -> Candidate | None:
    """Some layout that fits, if any does; its step is not simulated."""
    return next((each for each in Candidates(request) if each.modules), None)


def closest(request: Request) -> tuple[Proposal | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """

    def with_more(percents: int) -> Request:
        return evolve(request, memory_bytes=request.memory_bytes * 1.01**percents)

    percents = bisect_left(range(MOST_STEPS), True, key=lambda each: bool(_first(with_more(each))))
    if found := _first(with_more(percents)):
        layout = costed(request, found)
        return layout, [
            f"closest is {in_words(found)}",
            *shortages(layout),
            *_what_would_do(request),
        ]
    return None, [
        f"no combination of TP, PP and DP that divides the modules and the batch takes "
        f"{request.gpus} GPUs or fewer",
        *_what_would_do(request),
    ]


def _what_would_do(request: Request) -> Iterator[str]:
    """The fewest nodes on which a layout fits, or the modules that fit on none."""

    def on(nodes: int) -> Request:
        return evolve(request, gpus=nodes * request.gpus_per_node)

    nodes = range(1, MOST_NODES)
    fewest = bisect_left(nodes, True, key=lambda each: bool(_first(on(each)))) + 1
    if fit := _first(on(fewest)):
        yield f"{on(fewest).gpus} GPUs would do: {in_words(fit)}"
        return
    everywhere = Candidates(evolve(request, memory_bytes=inf, gpus=on(MOST_NODES).gpus))
    for name, every in everywhere.choices.items():
        found = [everywhere.ways(choice)[-1] for choice in every]
        samples = {choice: request.micro_batch_size or choice.replicas for choice in found}
        dealt = (choice for choice in found if samples[choice] % choice.replicas == 0)
        least = min((everywhere.held(each, samples[each]) for each in dealt), default=0.0)
        if least > request.memory_bytes:
            yield (
                f"{name} fits on no number of GPUs: its fullest rank holds {least / GB:.1f} GB at "
                f"least; use the distributed optimizer, or rent GPUs with "
                f"more memory"
            )


def shortages(layout: Proposal) -> Iterator[str]:
    """What a rank of each module lacks, with the other modules on the same rank."""
    sharing: dict[range, list[str]] = {}
    for name, grid in layout.grids.items():
        sharing.setdefault(grid.ranks, []).append(name)
    most = layout.request.memory_bytes
    for names in sharing.values():
        leader, *others = names
        held, stage = max(
            (held, stage) for (name, stage), held in layout.rank_memory.items() if name == leader
        )
        if held > most:
            parts = "; ".join(
                f"{name + ' ' if others else ''}"
                + ", ".join(
                    f"{part} {getattr(layout.memory[name, stage], part) / GB:.1f}" for part in PARTS
                )
                for name in names
            )
            who = f"{leader} stage {stage} needs"
            who = f"{' and '.join(names)} together need" if others else who
            yield f"{who} {held / GB:.1f} GB of {most / GB:.1f} GB a GPU: {parts}"


def in_words(candidate: Candidate) -> str:
    """A layout and its microbatch, in a line."""
    parts = []
    for choice in (*candidate.choices[1:], candidate.choices[0]):
        tp, cp, dp, pp = choice.parallelism.shape
        context = f" x CP {cp}" if cp > 1 else ""
        again = f" recomputing {choice.sizes.recomputed}" if choice.sizes.recomputed else ""
        parts.append(f"{choice.name} TP {tp}{context} x PP {pp} x DP {dp}{again}")
    return f"{', '.join(parts)}, with a microbatch of {candidate.samples}"
