"""Changes to a layout that make it take just the ranks of a world."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import evolve

from megatron_mimo_coord.layout import ModuleGrid, ModuleParallelism, default_topology, pack
from megatron_mimo_coord.problems import layout_problems

CHANGEABLE = (
    "data_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)


def ways_to_fit(
    modules: Mapping[str, ModuleParallelism],
    world_size: int,
    is_fine: Callable[[Sequence[ModuleGrid]], bool] = lambda grids: True,
) -> list[str]:
    """Changes after which a layout takes all ranks of a world, each as what to write.

    Tried are another size of one module, and a larger DP of all modules together.

    Args:
        modules: sizes of each module.
        world_size: ranks in the job.
        is_fine: what else must hold of the changed layout.

    Example:
        >>> vision, language = ModuleParallelism(), ModuleParallelism(data_parallel_size=2)
        >>> for way in ways_to_fit({"vision": vision, "language": language}, 4):
        ...     print(way)
        [vision] data_parallel_size = 2
        [vision] tensor_model_parallel_size = 2
        [vision] pipeline_model_parallel_size = 2
        [language] data_parallel_size = 3
    """
    ways = []
    for changes in _changes(modules, world_size) if modules else ():
        try:
            changed = dict(modules) | {
                name: evolve(modules[name], **{field: size})
                for name, (field, size) in changes.items()
            }
        except ValueError:  # the experts do not divide it
            continue
        grids = pack(changed)
        if not layout_problems(grids, default_topology(grids), world_size) and is_fine(
            list(grids.values())
        ):
            ways.append(
                ", ".join(f"[{name}] {field} = {size}" for name, (field, size) in changes.items())
            )
    return ways


def _changes(
    modules: Mapping[str, ModuleParallelism], world_size: int
) -> Iterator[dict[str, tuple[str, int]]]:
    """Each change that could fit: field and new value of every module that it changes."""
    taken = max(grid.ranks.stop for grid in pack(modules).values())
    for name, module in modules.items():
        for field in CHANGEABLE:
            size = getattr(module, field)
            more, rest = divmod((world_size - taken) * size, module.size)
            if rest or size + more < 1:
                continue
            low, high = sorted((size, size + more))
            # TP divides the attention heads: a multiple or a part of what it is now may do so too.
            if high % low == 0 or field != "tensor_model_parallel_size":
                yield {name: (field, size + more)}
    if world_size % taken == 0 and len(modules) > 1:
        field = CHANGEABLE[0]
        times = world_size // taken
        yield {name: (field, getattr(module, field) * times) for name, module in modules.items()}
