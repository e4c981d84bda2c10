"""Where no layout fits: which comes closest, what it lacks, and how many GPUs would do."""

from collections.abc import Iterator, Mapping
from math import inf

from attrs import evolve

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.candidates import Candidates
from megatron_mimo_coord.planning.choices import Task
from megatron_mimo_coord.planning.memory import PARTS, StageMemory
from megatron_mimo_coord.planning.search import Fit, Proposal, cost, first

MOST_GPUS = 2**16  # that are looked at for how many would do
GB = 1e9


def closest(task: Task) -> tuple[Proposal | None, list[str]]:
    """Where none fits: the layout with the least memory on its fullest rank, and what it lacks.

    The layout is None if GPUs do not suffice for any. How many would do is said too.
    """
    layout = None
    if found := _smallest(task):
        modules, samples, _ = found
        layout = cost(task, modules, samples)
        reasons = [f"closest is {in_words(modules, samples)}", *shortages(layout)]
    else:
        reasons = [
            f"no combination of TP, PP and DP that divides the modules and the batch takes "
            f"{task.room.gpus} GPUs or fewer",
            *_stages_with_costs(task),
        ]
    return layout, [*reasons, *_what_would_do(task)]


def _smallest(task: Task) -> Fit | None:
    """The layout that fits into the least memory, to a percent."""
    best = first(evolve(task, memory_bytes=inf))
    least = task.memory_bytes
    while best and best[2] > 1.01 * least:
        middle = (least * best[2]) ** 0.5
        smaller = first(evolve(task, memory_bytes=middle))
        best, least = smaller or best, least if smaller else middle
    return best


def _what_would_do(task: Task) -> Iterator[str]:
    """The fewest nodes on which a layout fits, or why there are none."""
    per_node = task.room.gpus_per_node

    def on(nodes: int) -> Fit | None:
        return first(evolve(task, room=evolve(task.room, gpus=nodes * per_node)))

    too_few = task.room.gpus // per_node
    enough, fit = max(1, too_few), None
    while not fit and enough * per_node < MOST_GPUS:
        enough *= 2
        fit = on(enough)
    while fit and enough - too_few > 1:
        middle = (too_few + enough) // 2
        if smaller := on(middle):
            enough, fit = middle, smaller
        else:
            too_few = middle
    if fit:
        yield f"{enough * per_node} GPUs would do: {in_words(*fit[:2])}"
    else:
        yield from _too_large(task)


def _too_large(task: Task) -> Iterator[str]:
    """The modules that no number of GPUs makes small enough."""
    everywhere = Candidates(evolve(task, room=evolve(task.room, gpus=MOST_GPUS)))
    for name, found in everywhere.choices.items():
        least = min(
            (
                everywhere.held(choice, task.micro_batch_size or choice.replicas)
                for choice in found
                if (task.micro_batch_size or choice.replicas) % choice.replicas == 0
            ),
            default=0.0,
        )
        if least > task.memory_bytes:
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
    for names in sharing.values():
        leader, *others = names
        held, stage = max(
            (held, stage) for (name, stage), held in layout.rank_memory.items() if name == leader
        )
        if held <= layout.memory_bytes:
            continue
        who = f"{' and '.join(names)} together need" if others else f"{leader} stage {stage} needs"
        parts = "; ".join(
            f"{name + ' ' if others else ''}{_parts(layout.memory[name, stage])}" for name in names
        )
        yield f"{who} {held / GB:.1f} GB of {layout.memory_bytes / GB:.1f} GB a GPU: {parts}"


def _stages_with_costs(task: Task) -> Iterator[str]:
    """The modules whose PP measured costs prescribe."""
    for name in task.sizes:
        layers = task.costs(name, ModuleParallelism()).layers_per_stage
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
