"""Arithmetic on ranks and sizes: where modules lie, what they read, how their gradients are scaled.

Everything here is plain integers, so it runs on a laptop, on every rank (in or out of a grid) and
for layouts of any size. This module imports neither torch nor megatron.

Vocabulary, kept everywhere in the package:

    module       a part of the model with its own grid: ``"language"``, ``"vision"``, ...
    grid         a box of consecutive ranks with named dims; the first dim varies fastest
    dim          one axis of a grid: ``tp``, ``cp``, ``dp``, ``pp``
    replicas     R_m = DP x CP of module m, the group that Megatron's DDP reduces it over
    bridge       the edge of the topology over which an encoder sends to the language model
    fan-in       a bridge from more data-parallel ranks to fewer; fan-out is the reverse
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from attrs import Attribute, Converter, field, frozen

LANGUAGE = "language"
"""Name of the language model in every map; Megatron's ``MIMO_LANGUAGE_MODULE_KEY``."""

Topology = Mapping[str, Sequence[str]]
"""For each module, the modules that its output goes to."""


MOST_RANKS = 2**31
"""No job has more: a larger number is a slip of the pen."""


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer that can count ranks or samples."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and least <= value < MOST_RANKS


def shown(value: Any) -> str:
    """What a user gave, as far as it can be printed.

    Example:
        >>> shown("four"), shown(10**99)
        ("'four'", 'an integer of 329 bits')
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _positive(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
    if not is_count(value):
        raise ValueError(
            f"{attribute.name} must be a positive integer below 2**31, got {shown(value)}; write a "
            f"number of ranks, or leave it out for the default"
        )


def _offset(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
    if value is not None and not is_count(value, least=0):
        raise ValueError(
            f"{attribute.name} must be a rank, 0 or more and below 2**31, got {shown(value)}; "
            f"write the module's first rank, or leave it out to pack it behind those before"
        )


def _same_as_tensor_parallel(size: Any, module: Any) -> Any:
    return module.tensor_model_parallel_size if size is None else size


@frozen(kw_only=True)
class ModuleParallelism:
    """The parallel sizes of one module, as a user writes them down.

    Args:
        tensor_model_parallel_size: TP, ranks that share each layer's weights.
        context_parallel_size: CP, ranks that share each sequence.
        pipeline_model_parallel_size: PP, stages that share the layers.
        data_parallel_size: DP, replicas that share the batch.
        expert_model_parallel_size: EP, ranks that share the experts of a mixture-of-experts layer.
        expert_tensor_parallel_size: TP inside an expert; None means the same as TP.
        rank_offset: first global rank of the module; None packs it behind the modules before it.

    Raises:
        ValueError: a size is not a positive integer, or TP x CP x DP ranks of a pipeline stage
            cannot be divided among expert TP x EP.

    Example:
        >>> ModuleParallelism(tensor_model_parallel_size=2, data_parallel_size=4).size
        8
    """

    tensor_model_parallel_size: int = field(default=1, validator=_positive)
    context_parallel_size: int = field(default=1, validator=_positive)
    pipeline_model_parallel_size: int = field(default=1, validator=_positive)
    data_parallel_size: int = field(default=1, validator=_positive)
    expert_model_parallel_size: int = field(default=1, validator=_positive)
    expert_tensor_parallel_size: int = field(
        default=None,
        converter=Converter(_same_as_tensor_parallel, takes_self=True),  # type: ignore[misc]
        validator=_positive,
    )
    rank_offset: int | None = field(default=None, validator=_offset)

    def __attrs_post_init__(self) -> None:
        stage = self.size // self.pipeline_model_parallel_size
        expert = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        if stage % expert:
            raise ValueError(
                f"expert_tensor_parallel_size {self.expert_tensor_parallel_size} x "
                f"expert_model_parallel_size {self.expert_model_parallel_size} = {expert} does not "
                f"divide the {stage} ranks of a pipeline stage (TP "
                f"{self.tensor_model_parallel_size} x CP {self.context_parallel_size} x DP "
                f"{self.data_parallel_size}); choose expert sizes whose product divides {stage}"
            )

    @property
    def size(self) -> int:
        """Number of ranks: TP x CP x DP x PP."""
        return prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes in the order of :data:`DIM_NAMES`, for ``HyperCommGrid``."""
        return (
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.data_parallel_size,
            self.pipeline_model_parallel_size,
        )

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Sizes in the order of :data:`EXPERT_DIM_NAMES`: the same ranks, factored for experts."""
        expert = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        expert_dp = self.size // (expert * self.pipeline_model_parallel_size)
        return (
            self.expert_tensor_parallel_size,
            self.expert_model_parallel_size,
            expert_dp,
            self.pipeline_model_parallel_size,
        )


# Megatron's own order (tp-cp-ep-dp-pp). pp comes last because only then do the dense and the
# expert factorization share their pipeline groups whatever the other sizes are.
DIM_NAMES = ("tp", "cp", "dp", "pp")
EXPERT_DIM_NAMES = ("expt_tp", "ep", "expt_dp", "pp")


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


def gradient_scaling_factor(
    replicas: int, language_replicas: int, *, ddp_sums: bool, per_token: bool
) -> float:
    """Factor from what DDP delivers for a module to the gradient of the one loss.

    DDP delivers the sum over the module's R_m replicas if ``ddp_sums``, else the mean. The loss is
    the mean over the language model's replicas, or, if ``per_token``, the sum over all unmasked
    tokens divided by their number N. Hence

        c_m = (1 if ddp_sums else R_m) x (1/N if per_token else 1/R_language)

    Returns:
        c_m, without the 1/N that only each step knows.

    Example:
        Both average: encoder DP / language DP.

        >>> gradient_scaling_factor(4, 2, ddp_sums=False, per_token=False)
        2.0
    """
    return (1.0 if ddp_sums else float(replicas)) / (1 if per_token else language_replicas)
