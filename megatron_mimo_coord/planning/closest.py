"""Where no layout fits: which comes closest, what it lacks, and how many GPUs would do."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from math import inf

from attrs import evolve

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.candidates import Candidates
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.memory import PARTS, StageMemory
from megatron_mimo_coord.planning.search import Proposal, cost

MOST_GPUS = 2**16  # that are looked at for how many would do
MOST_STEPS = 4_000  # of a percent, from the memory that there is to what a layout needs
GB = 1e9

Fit = tuple[dict[str, ModuleParallelism], int]
"""A layout, and its microbatch."""


def first(request: Request) -> Fit | None:
    """Some layout that fits, if any does; its step is not simulated."""
    every = ((candidate.modules, candidate.samples) for candidate in Candidates(request))
    return next(((modules, samples) for modules, samples in every if modules), None)


def closest(request: Request) -> tuple[Proposal | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """
    layout = None
    if first(evolve(request, memory_bytes=inf)):
        layout = cost(request, *_smallest(request))
        words = in_words(layout.modules, layout.micro_batch_size)
        reasons = [f"closest is {words}", *shortages(layout)]
    else:
        reasons = [
            f"no combination of TP, PP and DP that divides the modules and the batch takes "
            f"{request.gpus} GPUs or fewer",
            *_stages_with_costs(request),
        ]
    return layout, [*reasons, *_what_would_do(request)]


def _smallest(request: Request) -> Fit:
    """The layout that fits into the least memory, to a percent."""

    def with_more(percents: int) -> Fit | None:
        return first(evolve(request, memory_bytes=request.memory_bytes * 1.01**percents))

    percents = bisect_left(range(MOST_STEPS), True, key=lambda each: with_more(each) is not None)
    fit = with_more(percents)
    assert fit, "memory was no limit"
    return fit


def _what_would_do(request: Request) -> Iterator[str]:
    """The fewest nodes on which a layout fits, or why there are none."""

    def on(nodes: int) -> Fit | None:
        return first(evolve(request, gpus=nodes * request.gpus_per_node))

    nodes = range(1, MOST_GPUS // request.gpus_per_node + 1)
    fewest = bisect_left(nodes, True, key=lambda each: on(each) is not None) + 1
    if fit := on(fewest):
        yield f"{fewest * request.gpus_per_node} GPUs would do: {in_words(*fit)}"
    else:
        yield from _too_large(request)


def _too_large(request: Request) -> Iterator[str]:
    """The modules that no number of GPUs makes small enough."""
    everywhere = Candidates(evolve(request, gpus=MOST_GPUS))
    for name, found in everywhere.choices.items():
        of_choices = (
            everywhere.held(choice, request.micro_batch_size or choice.replicas)
            for choice in found
            if (request.micro_batch_size or choice.replicas) % choice.replicas == 0
        )
        least = min(of_choices, default=0.0)
        if least > request.memory_bytes:
            yield (
                f"{name} fits on no number of GPUs: its fullest rank holds {least / GB:.1f} GB at "
                f"least; recompute activations, use the distributed optimizer, or rent GPUs with "
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
        if held <= most:
            continue
        who = f"{' and '.join(names)} together need" if others else f"{leader} stage {stage} needs"
        parts = "; ".join(
            f"{name + ' ' if others else ''}{_parts(layout.memory[name, stage])}" for name in names
        )
        yield f"{who} {held / GB:.1f} GB of {most / GB:.1f} GB a GPU: {parts}"


def _stages_with_costs(request: Request) -> Iterator[str]:
    """The modules whose PP measured costs prescribe."""
    for name in request.sizes:
        layers = request.costs(name, ModuleParallelism()).layers_per_stage
        if layers is not None and len(layers) > 1:
            yield (
                f"the costs of {name} are of {len(layers)} stages, so that its PP must be "
                f"{len(layers)}: leave layers_per_stage out of the costs for any other"
            )


def _parts(held: StageMemory) -> str:
    return ", ".join(f"{part} {getattr(held, part) / GB:.1f}" for part in PARTS)


def in_words(modules: Mapping[str, ModuleParallelism], micro_batch_size: int) -> str:
    """A layout and its microbatch, in a line."""
    sizes = ", ".join(
        f"{name} TP {module.shape[0]} x PP {module.shape[3]} x DP {module.shape[2]}"
        for name, module in modules.items()
    )
    return f"{sizes}, with a microbatch of {micro_batch_size}"
