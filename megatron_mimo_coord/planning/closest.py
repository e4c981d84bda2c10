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


def closest(request: Request) -> tuple[Proposal | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """
    nodes = -(-request.gpus // request.gpus_per_node)
    most = max(MOST_NODES, nodes) * request.gpus_per_node
    candidates = Candidates(evolve(request, gpus=most))

    def first(memory_bytes: float, gpus: int) -> Proposal | None:
        """Some layout that fits, if any does; its step is not simulated."""
        candidates.memory_bytes, candidates.gpus = memory_bytes, gpus
        placed = (Proposal.of(request, candidate) for candidate in candidates)
        return next(filter(None, placed), None)

    def with_more(percents: int) -> Proposal | None:
        return first(request.memory_bytes * 1.01**percents, request.gpus)

    def on(nodes: int) -> Proposal | None:
        return first(request.memory_bytes, nodes * request.gpus_per_node)

    said = []
    percents = bisect_left(range(MOST_STEPS), True, key=lambda each: bool(with_more(each)))
    if layout := with_more(percents):
        said += [f"closest is {in_words(layout)}", *shortages(layout)]
    else:
        said.append(
            f"no combination of TP, PP and DP that divides the modules and the batch takes "
            f"{request.gpus} GPUs or fewer"
        )
    nodes += bisect_left(range(nodes, MOST_NODES), True, key=lambda each: bool(on(each)))
    gpus = nodes * request.gpus_per_node
    if fit := on(nodes):
        said.append(f"{gpus:,} GPUs would do: {in_words(fit)}")
    else:
        said.append(
            f"{gpus:,} GPUs would not do either: use the distributed optimizer, or rent GPUs with "
            f"more memory"
        )
    return layout, said


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
