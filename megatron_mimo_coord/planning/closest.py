"""Where no layout fits: which comes closest, and what it lacks."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from math import inf, lcm

from attrs import evolve, field, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.choices import (
    Room,
    choices,
    divisors,
    is_bridgeable,
    side_by_side,
)
from megatron_mimo_coord.planning.memory import StageMemory
from megatron_mimo_coord.planning.search import Proposal, Search, Task, cost, least_memory

MOST_GPUS = 2**16  # that are looked at for how many would do
MOST_LOOKS = 200  # branches of a search for how many GPUs would do
GB = 1e9

Options = list[tuple[float, ModuleParallelism]]
"""(least bytes on a rank, sizes) of each way to lay out a module."""


@frozen
class Closest:
    """What comes closest to fitting.

    Args:
        layout: with the least memory on its fullest rank; None if GPUs do not suffice for any.
        reasons: what it lacks, and how many GPUs would do.
    """

    layout: Proposal | None
    reasons: list[str] = field(factory=list)


def closest(task: Task) -> Closest:
    """The layout that comes closest, where none fits."""
    options = _options(task, task.room)
    layouts = [
        cost(task, modules, _least_samples(task, modules))
        for modules in (_disjoint(task, options), _colocated(options))
        if modules
    ]
    layout = max(layouts, key=lambda each: each.headroom, default=None)
    reasons = [f"closest is {in_words(layout)}", *shortages(layout)] if layout else []
    if not layout:
        reasons.append(
            f"no combination of TP, PP and DP that divides the modules and the batch takes "
            f"{task.room.gpus} GPUs or fewer"
        )
        reasons += _stages_with_costs(task)
    return Closest(layout, [*reasons, *_what_would_do(task)])


def _options(task: Task, room: Room) -> dict[str, Options]:
    samples = task.micro_batch_size or room.global_batch_size
    options: dict[str, Options] = {}
    for name, sizes in task.sizes.items():
        stages = {
            pp
            for pp in divisors(sizes.num_layers)
            if task.has_costs(name, ModuleParallelism(pipeline_model_parallel_size=pp))
        }
        options[name] = [
            (least_memory(task, name, choice), choice)
            for choice in choices(name, sizes, room)
            if choice.pipeline_model_parallel_size in stages
            and samples % choice.data_parallel_size == 0
        ]
    return options


def _disjoint(task: Task, options: Mapping[str, Options]) -> dict[str, ModuleParallelism] | None:
    """Modules on ranks of their own, the fullest of which holds as little as can be."""
    limits = sorted({least for found in options.values() for least, _ in found})
    first = bisect_left(limits, True, key=lambda limit: bool(_within(task, options, limit)))
    chosen = _within(task, options, limits[first]) if first < len(limits) else None
    return chosen and side_by_side(chosen, task.room.gpus_per_node)


def _within(
    task: Task, options: Mapping[str, Options], limit: float
) -> dict[str, ModuleParallelism] | None:
    """Modules that hold no more than a limit and that the GPUs suffice for."""
    chosen = _smallest(options, limit)
    if chosen and sum(module.size for module in chosen.values()) <= task.room.gpus:
        return chosen
    return None


def _smallest(options: Mapping[str, Options], limit: float) -> dict[str, ModuleParallelism] | None:
    """The fewest ranks of each module on which it holds no more than a limit.

    A DP of 1 goes with any other; with one replica a module takes the fewest ranks, unless only
    sharding its optimizer brings it below the limit, and then the others follow it.
    """
    chosen = {}
    for name, found in options.items():
        fit = [choice for least, choice in found if least <= limit]
        if not fit:
            return None
        chosen[name] = min(fit, key=lambda choice: (choice.size, choice.data_parallel_size))
    language = chosen[LANGUAGE]
    return chosen if all(is_bridgeable(each, language) for each in chosen.values()) else None


def _colocated(options: Mapping[str, Options]) -> dict[str, ModuleParallelism] | None:
    """Modules on the same ranks, which hold as little as can be."""
    if len(options) == 1:
        return None
    best, least = None, inf
    languages = [each for each in options[LANGUAGE] if each[1].pipeline_model_parallel_size == 1]
    for held, language in languages:
        total, chosen = held, {LANGUAGE: language}
        for name, found in options.items():
            if name == LANGUAGE:
                continue
            fit = [
                each
                for each in found
                if each[1].size == language.size
                and each[1].pipeline_model_parallel_size == 1
                and is_bridgeable(each[1], language)
            ]
            if not fit:
                break
            more, chosen[name] = min(fit, key=lambda each: each[0])
            total += more
        else:
            if total < least:
                best, least = chosen, total
    return best and {name: evolve(best[name], rank_offset=0) for name in options}


def _least_samples(task: Task, modules: Mapping[str, ModuleParallelism]) -> int:
    """The smallest microbatch that all replicas of a layout can share."""
    return task.micro_batch_size or lcm(*(each.data_parallel_size for each in modules.values()))


def shortages(layout: Proposal) -> Iterator[str]:
    """What a rank of each module lacks, with the other modules on the same rank."""
    sharing: dict[range, list[str]] = {}
    for name, grid in layout.grids.items():
        sharing.setdefault(grid.ranks, []).append(name)
    for names in sharing.values():
        first, *others = names
        held, stage = max(
            (held, stage) for (name, stage), held in layout.rank_memory.items() if name == first
        )
        if held <= layout.memory_bytes:
            continue
        who = f"{' and '.join(names)} together need" if others else f"{first} stage {stage} needs"
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
    parts = ("weights", "gradients", "optimizer", "activations", "working", "messages")
    return ", ".join(f"{part} {getattr(held, part) / GB:.1f}" for part in parts)


def _what_would_do(task: Task) -> Iterator[str]:
    """The fewest nodes on which a layout fits, as far as each module's memory tells."""
    options = _options(task, evolve(task.room, gpus=MOST_GPUS))
    if not all(options.values()):
        return  # costs are of a PP that does not divide the layers
    for name, found in options.items():
        if not any(least <= task.memory_bytes for least, _ in found):
            fullest = min(least for least, _ in found)
            yield (
                f"{name} fits on no number of GPUs: its fullest rank holds {fullest / GB:.1f} GB "
                f"at least; recompute activations, use the distributed optimizer, or rent GPUs "
                f"with more memory"
            )
            return
    chosen = _smallest(options, task.memory_bytes)
    if not chosen:
        return
    ranks = sum(module.size for module in chosen.values())
    gpus = -(-ranks // task.room.gpus_per_node) * task.room.gpus_per_node
    for more in (1, 2, 4):
        room = evolve(task.room, gpus=gpus * more)
        if room.gpus <= task.room.gpus:
            continue
        search = Search(evolve(task, room=room))
        for fit in search.best(1, is_any_enough=True, most=MOST_LOOKS):
            yield f"{fit.allocated} GPUs would do: {in_words(fit)}"
            return
        if not search.is_complete:
            yield f"whether {room.gpus} GPUs would do was not found in {MOST_LOOKS} tries"
            return


def in_words(layout: Proposal) -> str:
    """A layout and its microbatch, in a line."""
    sizes = ", ".join(
        f"{name} TP {module.shape[0]} x PP {module.shape[3]} x DP {module.shape[2]}"
        for name, module in layout.modules.items()
    )
    return f"{sizes}, with a microbatch of {layout.micro_batch_size}"
