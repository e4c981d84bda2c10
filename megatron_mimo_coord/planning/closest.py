"""Where no layout fits: which comes closest, what it lacks, and how many GPUs would do."""

from bisect import bisect_left
from collections.abc import Iterator

from attrs import evolve

from megatron_mimo_coord.layout import modules_by_stage
from megatron_mimo_coord.planning.candidates import Candidates
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.memory import PARTS
from megatron_mimo_coord.planning.search import Proposal

MOST_NODES = 2**13  # that are looked at for how many would do
MOST_STEPS = 4_000  # of a percent, from the memory that there is to what a layout needs
GB = 1e9


def _first(request: Request) -> Proposal | None:
    """Some layout that fits, if any does; its step is not simulated."""
    placed = (Proposal.of(request, candidate) for candidate in Candidates(request))
    return next(filter(None, placed), None)


def closest(request: Request) -> tuple[Proposal | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """

    def with_more(percents: int) -> Request:
        return evolve(request, memory_bytes=request.memory_bytes * 1.01**percents)

    percents = bisect_left(range(MOST_STEPS), True, key=lambda each: bool(_first(with_more(each))))
    if found := _first(with_more(percents)):
        layout = evolve(found, request=request)
        said = [f"closest is {in_words(layout)}", *shortages(layout), what_would_do(request)]
        return layout, said
    return None, [
        f"no combination of TP, PP and DP that divides the modules and the batch takes "
        f"{request.gpus} GPUs or fewer",
        what_would_do(request),
    ]


def what_would_do(request: Request) -> str:
    """The fewest nodes on which a layout fits."""

    def on(nodes: int) -> Request:
        return evolve(request, gpus=nodes * request.gpus_per_node)

    nodes = range(1, MOST_NODES)
    fewest = bisect_left(nodes, True, key=lambda each: bool(_first(on(each)))) + 1
    if fit := _first(on(fewest)):
        return f"{on(fewest).gpus} GPUs would do: {in_words(fit)}"
    cure = "use the distributed optimizer, or rent GPUs with more memory"
    return f"{on(fewest).gpus:,} GPUs would not do either: {cure}"


def shortages(layout: Proposal) -> Iterator[str]:
    """What the fullest rank of each module lacks, with the other modules on the same rank."""
    most, fullest = layout.request.memory_bytes, dict[tuple[str, ...], tuple[float, int]]()
    for names, stage in modules_by_stage(layout.grids):
        held = layout.rank_memory[names[0], stage]
        fullest[*names,] = max(fullest.get((*names,), (0.0, 0)), (held, stage))
    for modules, (held, stage) in fullest.items():
        if held <= most:
            continue
        parts = [
            ", ".join(
                f"{part} {getattr(layout.memory[name, stage], part) / GB:.1f}" for part in PARTS
            )
            for name in modules
        ]
        who = f"{modules[0]} stage {stage} needs"
        if len(modules) > 1:
            who = f"{' and '.join(modules)} together need"
            parts = [f"{name} {part}" for name, part in zip(modules, parts, strict=True)]
        yield f"{who} {held / GB:.1f} GB of {most / GB:.1f} GB a GPU: {'; '.join(parts)}"


def in_words(layout: Proposal) -> str:
    """A layout and its microbatch, in a line."""
    parts = []
    for name, module in layout.modules.items():
        tp, cp, dp, pp = module.shape
        context = f" x CP {cp}" if cp > 1 else ""
        recomputed = layout.sizes[name].recomputed
        again = f" recomputing {recomputed}" if recomputed else ""
        parts.append(f"{name} TP {tp}{context} x PP {pp} x DP {dp}{again}")
    return f"{', '.join(parts)}, with a microbatch of {layout.micro_batch_size}"
