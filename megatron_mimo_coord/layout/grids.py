"""Where modules lie: boxes of consecutive ranks, and how an index along a dim becomes a rank."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from attrs import field, frozen

from megatron_mimo_coord.layout.parallelism import DIM_NAMES, SIZE_FIELDS, ModuleParallelism

LANGUAGE = "language"
"""Name of the language model in every map; Megatron's ``MIMO_LANGUAGE_MODULE_KEY``."""

Topology = Mapping[str, Sequence[str]]
"""For each module, the modules that its output goes to."""


@frozen
class ModuleGrid:
    """Where one module lies: a box of consecutive ranks, whoever made it.

    Args:
        name: the module.
        shape: sizes of the dims.
        dim_names: names of the dims, the fastest varying first, as in ``HyperCommGrid``.
        rank_offset: first global rank.
        expert_sizes: (EP, TP of an expert) where they are known.

    Example:
        >>> grid = ModuleGrid("language", (2, 1, 2, 1), DIM_NAMES, rank_offset=4)
        >>> print(grid)
        language (ranks 4-7: TP 2 x CP 1 x DP 2 x PP 1)
        >>> grid.coordinate(6, "dp"), grid.rank_at(dp=1)
        (1, 6)
    """

    name: str
    shape: Sequence[int] = field(converter=tuple[int, ...])
    dim_names: Sequence[str] = field(converter=tuple[str, ...])
    rank_offset: int = 0
    expert_sizes: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, grid: Any) -> "ModuleGrid":
        """Read the arithmetic of a ``HyperCommGrid``, of which any rank can be a non-member."""
        return cls(name, grid.shape, grid.dim_names, grid.rank_offset)

    def dim(self, name: str) -> int:
        """Size of a dim, 1 if the grid does not have it."""
        return self.shape[self.dim_names.index(name)] if name in self.dim_names else 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.shape)

    @property
    def ranks(self) -> range:
        """Global ranks of the module."""
        return range(self.rank_offset, self.rank_offset + self.size)

    @property
    def data_parallel_size(self) -> int:
        """DP, the number of ranks that read different samples."""
        return self.dim("dp")

    @property
    def replicas(self) -> int:
        """R_m = DP x CP, the group that Megatron's DDP reduces the module over."""
        return self.dim("dp") * self.dim("cp")

    @property
    def unknown_dims(self) -> list[str]:
        """Dims larger than 1 of which nobody knows whether their ranks share their samples."""
        return [name for name in self.dim_names if name not in SIZE_FIELDS and self.dim(name) > 1]

    def fields(self) -> dict[str, str]:
        """All that ranks must agree about, under the names of ``ModuleParallelism``.

        Example:
            >>> ModuleGrid("language", (2, 4), ("tp", "dp")).fields()["data_parallel_size"]
            '4'
        """
        sizes = {SIZE_FIELDS.get(name, name): str(self.dim(name)) for name in self.dim_names}
        order = {"order of the dims": "-".join(self.dim_names)}
        return {**sizes, **order, "rank_offset": str(self.rank_offset)}

    def coordinate(self, rank: int, dim: str) -> int:
        """Index of a global rank along ``dim``; the rank must be in the grid."""
        index = self.ranks.index(rank)
        for name, size in zip(self.dim_names, self.shape, strict=True):
            if name == dim:
                return index % size
            index //= size
        return 0

    def rank_at(self, **coordinates: int) -> int:
        """Global rank at the given index along each named dim, 0 along the others."""
        rank, stride = self.rank_offset, 1
        for name, size in zip(self.dim_names, self.shape, strict=True):
            rank += coordinates.get(name, 0) * stride
            stride *= size
        return rank

    def replica_starts(self, stage: int) -> range:
        """The first rank of each data-parallel replica, of those that run a pipeline stage.

        Example:
            >>> list(ModuleGrid("vision", (2, 1, 3), DIM_NAMES[:3]).replica_starts(0))
            [0, 2, 4]
        """
        first, length = self.rank_at(pp=stage), self.size // self.dim("pp")
        return range(first, first + length, length // self.data_parallel_size)

    def replica(self, rank: int) -> set[int]:
        """The ranks that hold the whole module together with one of its ranks.

        Example:
            >>> sorted(ModuleGrid("vision", (2, 2), ("tp", "dp")).replica(3))
            [2, 3]
        """
        place = {dim: self.coordinate(rank, dim) for dim in ("dp", "cp")}
        return {
            other
            for other in self.ranks
            if all(self.coordinate(other, dim) == index for dim, index in place.items())
        }

    def is_on_last_stage(self, rank: int) -> bool:
        """Whether a global rank, in the grid or not, runs the module's last pipeline stage."""
        return rank in self.ranks and self.coordinate(rank, "pp") == self.dim("pp") - 1

    def __str__(self) -> str:
        sizes = " x ".join(
            f"{dim.upper()} {size}" for dim, size in zip(self.dim_names, self.shape, strict=True)
        )
        return f"{self.name} (ranks {span(self.ranks)}: {sizes})"


def span(ranks: range) -> str:
    """A range of ranks as people write it.

    Example:
        >>> span(range(3, 4)), span(range(4))
        ('3', '0-3')
    """
    return f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"


def pack(modules: Mapping[str, ModuleParallelism]) -> dict[str, ModuleGrid]:
    """Give every module its ranks, in order; an omitted offset starts behind all ranks before.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=4)
        >>> language = ModuleParallelism(tensor_model_parallel_size=2)
        >>> [grid.ranks for grid in pack({"vision": vision, "language": language}).values()]
        [range(0, 4), range(4, 6)]
    """
    grids: dict[str, ModuleGrid] = {}
    end = 0
    for name, module in modules.items():
        offset = end if module.rank_offset is None else module.rank_offset
        experts = module.expert_model_parallel_size, module.expert_tensor_parallel_size
        grids[name] = ModuleGrid(name, module.shape, DIM_NAMES, offset, experts)
        end = max(end, offset + module.size)
    return grids


def default_topology(names: Iterable[str]) -> dict[str, list[str]]:
    """Every encoder feeds the language model, which is what ``MimoModel`` computes.

    Example:
        >>> default_topology(["vision", "language"])
        {'vision': ['language'], 'language': []}
    """
    return {name: [] if name == LANGUAGE else [LANGUAGE] for name in names}


def ranks_taken(grids: Iterable[ModuleGrid]) -> int:
    """Ranks of the smallest world that holds all modules; 0 if there are none."""
    return max((grid.ranks.stop for grid in grids), default=0)


def is_colocated(grids: Iterable[ModuleGrid]) -> bool:
    """Whether all modules share the same ranks, so that no rank sends to another module."""
    return len({(grid.rank_offset, grid.size) for grid in grids}) == 1


def runs_encoders_first(grids: Mapping[str, ModuleGrid]) -> bool:
    """Whether encoders share ranks with a language model otherwise than all with all, PP and CP 1.

    A rank then runs its encoders before the language model's pipeline, and their backward after it.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=2, rank_offset=0)
        >>> stages = ModuleParallelism(pipeline_model_parallel_size=2, rank_offset=0)
        >>> runs_encoders_first(pack({"vision": vision, "language": stages}))
        True
    """
    language = grids[LANGUAGE]
    if language.dim("pp") == language.dim("cp") == 1 and is_colocated(grids.values()):
        return False
    return bool(sharing(grids))


def sharing(grids: Mapping[str, ModuleGrid]) -> list[str]:
    """The encoders on ranks of the language model."""
    language = grids[LANGUAGE].ranks
    return [name for name in grids if name != LANGUAGE and overlap(grids[name].ranks, language)]


def modules_by_stage(grids: Mapping[str, ModuleGrid]) -> list[tuple[list[str], int]]:
    """(modules, stage) of all ranks, the modules in the order in which their forwards run.

    An encoder on ranks of the language model counts to each of its stages that it has ranks of.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=2, rank_offset=0)
        >>> stages = ModuleParallelism(pipeline_model_parallel_size=3, rank_offset=0)
        >>> modules_by_stage(pack({"vision": vision, "language": stages}))
        [(['vision', 'language'], 0), (['vision', 'language'], 1), (['language'], 2)]
    """
    shared, language = sharing(grids), grids[LANGUAGE]
    apart: dict[range, list[str]] = {}
    for name, grid in grids.items():
        if name != LANGUAGE and name not in shared:
            apart.setdefault(grid.ranks, []).append(name)
    found = [
        (names, stage) for names in apart.values() for stage in range(grids[names[0]].dim("pp"))
    ]
    length = language.size // language.dim("pp")
    for stage in range(language.dim("pp")):
        ranks = language.ranks[stage * length : (stage + 1) * length]
        here = [name for name in shared if overlap(grids[name].ranks, ranks)]
        found.append(([*here, LANGUAGE], stage))
    return found


def overlap(left: range, right: range) -> range:
    """The ranks that are in both.

    Example:
        >>> overlap(range(0, 4), range(2, 8))
        range(2, 4)
    """
    return range(max(left.start, right.start), min(left.stop, right.stop))


def stages_behind(grids: Mapping[str, ModuleGrid], module: str, stage: int) -> int:
    """Pipeline stages that a microbatch passes after one: its own module's, then the language's.

    A stage runs as many microbatches forward before its first backward, if a step has as many.

    Example:
        >>> grids = pack(dict.fromkeys(["vision", "language"], ModuleParallelism()))
        >>> stages_behind(grids, "vision", 0), stages_behind(grids, "language", 0)
        (1, 0)
    """
    behind = grids[module].dim("pp") - stage - 1
    if module == LANGUAGE or is_colocated(grids.values()) or runs_encoders_first(grids):
        return behind
    return behind + grids[LANGUAGE].dim("pp")
