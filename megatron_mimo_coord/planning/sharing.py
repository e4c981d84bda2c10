"""Which modules are on the ranks of which pipeline stage."""

from collections.abc import Mapping

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, overlap


def modules_by_stage(grids: Mapping[str, ModuleGrid]) -> list[tuple[list[str], int]]:
    """(modules, stage) of all ranks, the modules in the order in which their forwards run.

    An encoder on ranks of the language model counts to each of its stages that it has ranks of.

    Example:
        >>> from megatron_mimo_coord.layout import ModuleParallelism, pack
        >>> vision = ModuleParallelism(data_parallel_size=2, rank_offset=0)
        >>> stages = ModuleParallelism(pipeline_model_parallel_size=3, rank_offset=0)
        >>> modules_by_stage(pack({"vision": vision, "language": stages}))
        [(['vision', 'language'], 0), (['vision', 'language'], 1), (['language'], 2)]
    """
    shared = sharing(grids)
    apart: dict[range, list[str]] = {}
    for name, grid in grids.items():
        if name != LANGUAGE and name not in shared:
            apart.setdefault(grid.ranks, []).append(name)
    found = [
        (names, stage) for names in apart.values() for stage in range(grids[names[0]].dim("pp"))
    ]
    language = grids[LANGUAGE]
    length = language.size // language.dim("pp")
    for stage in range(language.dim("pp")):
        ranks = language.ranks[stage * length : (stage + 1) * length]
        here = [name for name in shared if overlap(grids[name].ranks, ranks)]
        found.append(([*here, LANGUAGE], stage))
    return found


def sharing(grids: Mapping[str, ModuleGrid]) -> list[str]:
    """The encoders on ranks of the language model."""
    language = grids[LANGUAGE].ranks
    return [name for name in grids if name != LANGUAGE and overlap(grids[name].ranks, language)]
