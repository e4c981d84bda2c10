"""Changes to a layout that make it take just the ranks of a world."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

from attrs import evolve

from megatron_mimo_coord.layout.grids import (
    LANGUAGE,
    ModuleGrid,
    default_topology,
    pack,
    ranks_taken,
)
from megatron_mimo_coord.layout.parallelism import ModuleParallelism
from megatron_mimo_coord.layout.problems import layout_problems

Change = Mapping[str, Mapping[str, int]]
"""For each module that changes, fields of ``ModuleParallelism`` and their new values."""

DP, TP, PP = "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"
MOST_TIMES = 8  # one DP of another, or a TP or PP of what it was
OFFERED = 5


def suggestions(
    modules: Mapping[str, ModuleParallelism],
    world_size: int,
    is_fine: Callable[[Sequence[ModuleGrid]], bool] = lambda grids: True,
) -> list[Change]:
    """A few changes after which a layout takes all ranks of a world, the smaller ones first.

    Tried are another size of one module, another DP of an encoder and the language model, and
    another DP of all modules in proportion.

    Args:
        modules: sizes of each module.
        world_size: ranks in the job.
        is_fine: what else must hold of the changed layout.

    Example:
        >>> vision, language = ModuleParallelism(), ModuleParallelism(data_parallel_size=2)
        >>> for way in suggestions({"vision": vision, "language": language}, 4):
        ...     print(in_words(way))
        [vision] data_parallel_size = 2
        [language] data_parallel_size = 3
        [vision] tensor_model_parallel_size = 2
        [vision] pipeline_model_parallel_size = 2
        [vision] data_parallel_size = 3, [language] data_parallel_size = 1
    """
    ways: list[Change] = []
    for sizes in _changes(modules, world_size) if modules else ():
        change = {
            name: new
            for name, new in sizes.items()
            if any(getattr(modules[name], field) != size for field, size in new.items())
        }
        try:
            changed = {name: _changed(modules[name], change.get(name, {})) for name in modules}
        except ValueError:  # the experts do not divide it
            continue
        grids = pack(changed)
        runs = not layout_problems(grids, default_topology(grids), world_size)
        if runs and change not in ways and is_fine(list(grids.values())):
            ways.append(change)
    return ways[:OFFERED]


def in_words(change: Change) -> str:
    """A change as what to write into a file."""
    return ", ".join(
        f"[{name}] {field} = {size}"
        for name, sizes in change.items()
        for field, size in sizes.items()
    )


def _changed(module: ModuleParallelism, sizes: Mapping[str, int]) -> ModuleParallelism:
    """A module with other sizes; an expert TP that was the same as TP stays the same as TP."""
    if module.expert_tensor_parallel_size == module.tensor_model_parallel_size:
        tp = sizes.get(TP, module.tensor_model_parallel_size)
        return evolve(module, expert_tensor_parallel_size=tp, **sizes)
    return evolve(module, **sizes)


def _changes(modules: Mapping[str, ModuleParallelism], world_size: int) -> Iterator[Change]:
    """What could make the layout fit, if nothing speaks against it."""
    more_ranks = world_size - sum(module.size for module in modules.values())
    for name in modules:
        yield from _one(name, modules[name], DP, more_ranks)
    times = Fraction(world_size, ranks_taken(pack(modules).values()))
    sizes = {name: module.data_parallel_size * times for name, module in modules.items()}
    if times != 1 and all(size.denominator == 1 for size in sizes.values()):
        yield {name: {DP: int(size)} for name, size in sizes.items()}
    for name in modules:
        for field in (TP, PP):
            yield from _one(name, modules[name], field, more_ranks)
    for name in modules:
        if name != LANGUAGE and LANGUAGE in modules:
            yield from _encoder_and_language(name, modules, more_ranks)


def _one(name: str, module: ModuleParallelism, field: str, more_ranks: int) -> Iterator[Change]:
    """Another size of one module."""
    size = getattr(module, field)
    more, rest = divmod(more_ranks * size, module.size)
    if rest or not more or size + more < 1:
        return
    low, high = sorted((size, size + more))
    # TP divides attention heads and PP layers: a small multiple or part may do so too.
    if field == DP or (high % low == 0 and high // low <= MOST_TIMES):
        yield {name: {field: size + more}}


def _encoder_and_language(
    name: str, modules: Mapping[str, ModuleParallelism], more_ranks: int
) -> Iterator[Change]:
    """Another DP of an encoder and of the language model, one a multiple of the other."""
    encoder, language = modules[name], modules[LANGUAGE]
    units = [module.size // module.data_parallel_size for module in (encoder, language)]
    ranks = encoder.size + language.size + more_ranks
    for times in range(1, MOST_TIMES + 1):
        for ratio in ((times, 1), (1, times)):
            dp, rest = divmod(ranks, units[0] * ratio[0] + units[1] * ratio[1])
            if not rest and dp > 0:
                yield {name: {DP: dp * ratio[0]}, LANGUAGE: {DP: dp * ratio[1]}}
