"""What must hold of a layout, and a sentence for each thing that does not: all at once.

Everything works on intervals of ranks, so that a million ranks cost no more than ten.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import Any, Self

from megatron_mimo_coord.layout.fields import is_count, shown
from megatron_mimo_coord.layout.grids import (
    LANGUAGE,
    ModuleGrid,
    Topology,
    default_topology,
    overlap,
    ranks_taken,
    sharing,
    span,
)
from megatron_mimo_coord.layout.parallelism import SIZE_FIELDS, ModuleParallelism

NAME = re.compile("[A-Za-z0-9_-]+")  # TOML takes these without quotes, PyTorch takes no dots


class Problem(str):
    """A sentence that says what is wrong and what to change.

    Attributes:
        places: (module, field of ``ModuleParallelism``) of all that the sentence is about; the
            field is empty where it is the module as a whole.

    Example:
        >>> problem = Problem("vision has no ranks; give it some", ("vision", "data_parallel_size"))
        >>> print(problem, problem.places)
        vision has no ranks; give it some (('vision', 'data_parallel_size'),)
    """

    places: tuple[tuple[str, str], ...]

    # A str is complete once it is made: there is no later point at which to add the places.
    def __new__(cls, sentence: str, *places: tuple[str, str]) -> Self:  # noqa: D102
        problem = super().__new__(cls, sentence)
        problem.places = places
        return problem


def listed(names: Sequence[object], most: int = 3) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> listed("abcde"), listed([0, 1])
        ('a, b, c and 2 more', '0, 1')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise one ``ValueError`` that lists every problem, or return if there is none."""
    if problems:
        raise ValueError("\n".join([f"{what}:", *(f"  - {problem}" for problem in problems)]))


def module_problems(modules: Any) -> list[Problem]:
    """What keeps a map from being one of names to parallel sizes."""
    if not isinstance(modules, Mapping):
        return [
            Problem(
                f"modules must map names to ModuleParallelism, got {modules!r}; write "
                f"{{'language': ModuleParallelism(...)}}"
            )
        ]
    problems: list[Problem] = []
    for name, module in modules.items():
        problems += name_problems(name)
        if not isinstance(module, ModuleParallelism):
            problems.append(
                Problem(
                    f"module {name!r} must be a ModuleParallelism, got {module!r}; write "
                    f"ModuleParallelism(data_parallel_size=...)"
                )
            )
    return problems


def name_problems(name: Any) -> Iterator[Problem]:
    """What keeps something from being the name of a module."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        yield Problem(
            f"module name {name!r} must be made of letters, digits, - and _ alone; rename the "
            f"module",
            (str(name), ""),
        )


def language_problems(names: Collection[str]) -> Iterator[Problem]:
    """What is wrong if none of the modules is the language model."""
    if LANGUAGE not in names:
        near = get_close_matches(LANGUAGE, names, n=1)
        yield Problem(
            f"there is no module named {LANGUAGE!r} (modules: {', '.join(names) or 'none'}); "
            f"Megatron's MimoModel needs exactly one, under that name: "
            + (f"rename {near[0]}" if near else f"add [{LANGUAGE}]")
            + (", or rename the language model" if names and not near else ""),
            (LANGUAGE, ""),
        )


def layout_problems(
    grids: Mapping[str, ModuleGrid], topology: Topology, world_size: int | None
) -> list[Problem]:
    """All that keeps a layout from running, each with the numbers and what to change.

    Args:
        grids: where each module lies.
        topology: for each module, the modules that its output goes to.
        world_size: ranks in the job; None for as many as the layout takes.

    Returns:
        One sentence a problem; empty if the layout runs.

    Example:
        >>> from megatron_mimo_coord.layout.grids import pack
        >>> grids = pack({"language": ModuleParallelism(data_parallel_size=2)})
        >>> layout_problems(grids, default_topology(grids), world_size=2)
        []
        >>> print(layout_problems(grids, default_topology(grids), world_size=3)[0])
        rank 2 of 3 is in no module; make a module larger, move one there with rank_offset, or \
launch fewer ranks
    """
    problems = list(language_problems(grids))
    if grids:
        ranks_of = {name: grid.ranks for name, grid in grids.items()}
        is_given = world_size is not None
        size = world_size if world_size is not None else ranks_taken(grids.values())
        problems += coverage_problems(ranks_of, size, is_given)
    problems += [
        Problem(
            f"module {grid} has a dim {dim} of size {grid.dim(dim)}, of which nobody here knows "
            f"whether its ranks read the same samples: build the grid of {', '.join(SIZE_FIELDS)}",
            (grid.name, ""),
        )
        for grid in grids.values()
        for dim in grid.unknown_dims
    ]
    problems += _sharing_problems(grids)
    if LANGUAGE in grids:
        problems += _topology_problems(grids, topology)
        for name, grid in grids.items():
            problems += _bridge_problems(grid, grids[LANGUAGE]) if name != LANGUAGE else ()
    return list(dict.fromkeys(problems))


def coverage_problems(
    ranks_of: Mapping[str, range], world_size: int, is_given: bool = True
) -> list[Problem]:
    """Ranks in no module, and modules beyond the world.

    Args:
        ranks_of: the ranks of each module.
        world_size: ranks in the job.
        is_given: whether the user gave that number, or it is just what the layout takes.
    """
    if not is_given and not is_count(world_size):
        return [
            Problem(
                f"the layout takes {world_size:,} ranks, more than the 2**31 - 1 of any job; make "
                f"a size or a rank_offset smaller",
                *((name, "") for name, ranks in ranks_of.items() if not is_count(ranks.stop)),
            )
        ]
    if not is_count(world_size):
        return [
            Problem(
                f"world_size must be a positive integer below 2**31, got {shown(world_size)}; give "
                f"the number of ranks of the job"
            )
        ]
    problems = [
        Problem(
            f"{'rank' if ranks[0] == ranks[-1] else 'ranks'} {span(ranks)}"
            f"{f' of {world_size}' if is_given else ''} "
            f"{'is' if ranks[0] == ranks[-1] else 'are'} in no module; make a module larger"
            + (", " if ranks.stop == world_size else " or ")
            + "move one there with rank_offset"
            + (", or launch fewer ranks" if ranks.stop == world_size else ""),
            *((name, "rank_offset") for name, of in ranks_of.items() if of.start == ranks.stop),
        )
        for ranks in idle_ranks(ranks_of, world_size)
    ]
    return problems + [
        Problem(
            f"module {name} (ranks {span(ranks)}) needs ranks up to {ranks[-1]}, but the world "
            f"has {world_size} ranks (0-{world_size - 1}); make its sizes or rank_offset "
            f"smaller, or launch at least {ranks.stop} ranks",
            (name, ""),
        )
        for name, ranks in ranks_of.items()
        if ranks.stop > world_size
    ]


def idle_ranks(ranks_of: Mapping[str, range], world_size: int) -> list[range]:
    """The ranks of a world that are in no module.

    Example:
        >>> idle_ranks({"vision": range(2), "language": range(4, 6)}, world_size=8)
        [range(2, 4), range(6, 8)]
    """
    idle = []
    covered = 0
    for ranks in sorted(ranks_of.values(), key=lambda ranks: ranks.start):
        if ranks.start > covered:
            idle.append(range(covered, min(ranks.start, world_size)))
        covered = max(covered, ranks.stop)
    idle.append(range(covered, world_size))
    return [ranks for ranks in idle if ranks]


def _sharing_problems(grids: Mapping[str, ModuleGrid]) -> Iterator[Problem]:
    """Encoders lie on the language model's ranks, with PP 1 and in any way; or none of them does.

    Elsewhere encoders share all their ranks, with the same PP, or none.
    """
    shared = sharing(grids) if LANGUAGE in grids else []
    encoders = [grid for name, grid in grids.items() if name not in (LANGUAGE, *shared)]
    encoders.sort(key=lambda grid: (grid.rank_offset, grid.size))
    for left, right in combinations(encoders, 2):
        if not overlap(left.ranks, right.ranks):
            continue
        if left.ranks != right.ranks:
            yield Problem(
                f"modules {left} and {right} overlap in part; two encoders on ranks of their "
                f"own must share all or none of them: change a rank_offset or a size",
                *((each.name, "rank_offset") for each in (left, right)),
            )
        elif left.dim("pp") != right.dim("pp"):
            yield Problem(
                f"modules {left} and {right} share their ranks with different PP; a rank "
                f"has one place in the pipeline: give them the same "
                f"pipeline_model_parallel_size",
                *((each.name, "pipeline_model_parallel_size") for each in (left, right)),
            )
    for grid in map(grids.__getitem__, shared):
        language = grids[LANGUAGE]
        offsets = ((grid.name, "rank_offset"), (LANGUAGE, "rank_offset"))
        if overlap(grid.ranks, language.ranks) != grid.ranks:
            yield Problem(
                f"modules {grid} and {language} overlap in part; an encoder lies on ranks of the "
                f"language model with all of its own or with none: change a rank_offset or a size",
                *offsets,
            )
        elif encoders:
            yield Problem(
                f"modules {grid} and {language} share their ranks, but {encoders[0]} has ranks of "
                f"its own; Megatron's MimoModel has the language model share ranks with every "
                f"encoder or with none: change a rank_offset",
                *offsets,
            )
        if grid.dim("pp") > 1:
            yield Problem(
                f"module {grid} has PP {grid.dim('pp')} and shares ranks with the language model, "
                f"but it runs there before and after it, and Megatron runs colocated modules "
                f"without a pipeline: set pipeline_model_parallel_size to 1 or give the module "
                f"ranks of its own",
                (grid.name, "pipeline_model_parallel_size"),
            )


def _topology_problems(grids: Mapping[str, ModuleGrid], topology: Any) -> Iterator[Problem]:
    expected = default_topology(grids)
    cure = (
        f"Megatron's MimoModel sends every encoder to {LANGUAGE!r} and {LANGUAGE!r} nowhere: use "
        f"{expected}"
    )
    if not isinstance(topology, Mapping):
        yield Problem(
            f"topology must map each module to a list of its targets, got {topology!r}; {cure}"
        )
        return
    for name in dict.fromkeys([*grids, *topology]):
        targets = topology.get(name, [])
        is_list = isinstance(targets, Sequence) and not isinstance(targets, str)
        if not is_list or list(targets) != expected.get(name, []):
            said = (list(targets) if is_list else targets) or "nothing"
            yield Problem(f"topology sends {name} to {said}; {cure}")


def _bridge_problems(source: ModuleGrid, target: ModuleGrid) -> Iterator[Problem]:
    if source.dim("cp") > 1:
        yield Problem(
            f"module {source} has CP {source.dim('cp')}, but only the {LANGUAGE} model has "
            f"sequences that ranks can share, and an encoder's CP must be 1: set its "
            f"context_parallel_size to 1, and data_parallel_size higher",
            (source.name, "context_parallel_size"),
        )
    sizes = source.data_parallel_size, target.data_parallel_size
    if max(sizes) % min(sizes):
        yield Problem(
            f"{source.name} has DP {sizes[0]} and {target.name} has DP {sizes[1]}: neither "
            f"divides the other, so no whole number of ranks sends to each; choose "
            f"data_parallel_size so that one is a multiple of the other",
            (source.name, "data_parallel_size"),
            (target.name, "data_parallel_size"),
        )
