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


def _positive(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{attribute.name} must be a positive integer, got {value!r}")


def _offset(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{attribute.name} must be a rank (0 or more) or None, got {value!r}")


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
    """

    name: str
    shape: Sequence[int] = field(converter=tuple[int, ...])
    dim_names: Sequence[str] = field(converter=tuple[str, ...])
    rank_offset: int = 0

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
    """A range of ranks as people write it: ``3`` or ``0-3``."""
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


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
        grids[name] = ModuleGrid(name, module.shape, DIM_NAMES, offset)
        end = max(end, offset + module.size)
    return grids


def default_topology(names: Iterable[str]) -> dict[str, list[str]]:
    """Every encoder feeds the language model, which is what ``MimoModel`` computes."""
    return {name: [] if name == LANGUAGE else [LANGUAGE] for name in names}


def is_colocated(grids: Iterable[ModuleGrid]) -> bool:
    """Whether all modules share the same ranks, so that no rank sends to another module."""
    return len({(grid.rank_offset, grid.size) for grid in grids}) == 1


# -- what must hold --------------------------------------------------------------------------------


def coverage_problems(ranks_of: Mapping[str, range], world_size: int) -> list[str]:
    """Ranks in no module, and modules beyond the world. Works on intervals: O(modules)."""
    problems = []
    covered = 0
    for name, ranks in sorted(ranks_of.items(), key=lambda item: item[1].start):
        if ranks.start > covered:
            problems.append(_idle(range(covered, min(ranks.start, world_size)), world_size))
        covered = max(covered, ranks.stop)
        if ranks.stop > world_size:
            problems.append(
                f"module {name} (ranks {span(ranks)}) needs ranks up to {ranks[-1]}, but the world "
                f"has {world_size} ranks (0-{world_size - 1}); make its sizes or rank_offset "
                f"smaller, or launch at least {ranks.stop} ranks"
            )
    if covered < world_size:
        problems.append(_idle(range(covered, world_size), world_size))
    return [problem for problem in problems if problem]


def _idle(ranks: range, world_size: int) -> str:
    if not ranks:
        return ""
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {span(ranks)}"
    return (
        f"{who} of {world_size} {'is' if len(ranks) == 1 else 'are'} in no module; make a module "
        f"larger, move one there with rank_offset, or launch fewer ranks"
    )


def layout_problems(
    grids: Mapping[str, ModuleGrid], topology: Topology, world_size: int
) -> list[str]:
    """All that keeps a layout from running, each with the numbers and what to change.

    Args:
        grids: where each module lies.
        topology: for each module, the modules that its output goes to.
        world_size: ranks in the job.

    Returns:
        One sentence a problem; empty if the layout runs.
    """
    problems = []
    if LANGUAGE not in grids:
        problems.append(
            f"there is no module named {LANGUAGE!r} (modules: {', '.join(grids) or 'none'}); "
            f"Megatron's MimoModel needs exactly one, under that name"
        )
    problems += coverage_problems({name: grid.ranks for name, grid in grids.items()}, world_size)
    problems += _sharing_problems(list(grids.values()))
    problems += _topology_problems(grids, topology)
    for source, target in _bridges(grids, topology):
        problems += _bridge_problems(source, target)
    if len(grids) > 1 and is_colocated(grids.values()):
        problems += [
            f"module {grid} has PP {grid.dim('pp')} and shares all its ranks with the other "
            f"modules; Megatron runs colocated modules without a pipeline: set "
            f"pipeline_model_parallel_size to 1 or give the modules ranks of their own"
            for grid in grids.values()
            if grid.dim("pp") > 1
        ]
    return problems


def _sharing_problems(grids: list[ModuleGrid]) -> list[str]:
    """Modules share all their ranks or none; and the language model shares with all or none."""
    problems = []
    everything_shared = is_colocated(grids)
    ordered = sorted(grids, key=lambda grid: (grid.rank_offset, grid.size))
    for index, left in enumerate(ordered):
        for right in ordered[index + 1 :]:
            if right.rank_offset >= left.rank_offset + left.size:
                break
            if left.ranks != right.ranks:
                problems.append(
                    f"modules {left} and {right} overlap in part; two modules must share all their "
                    f"ranks or none: change a rank_offset or a size"
                )
            elif LANGUAGE in (left.name, right.name) and not everything_shared:
                problems.append(
                    f"modules {left} and {right} share their ranks, but other modules have ranks "
                    f"of their own; Megatron's MimoModel has the language model share its ranks "
                    f"with every module or with none: change a rank_offset"
                )
            elif left.dim("pp") != right.dim("pp") and not everything_shared:
                problems.append(
                    f"modules {left} and {right} share their ranks with different PP; a rank has "
                    f"one place in the pipeline: give them the same pipeline_model_parallel_size"
                )
    return problems


def _topology_problems(grids: Mapping[str, ModuleGrid], topology: Topology) -> list[str]:
    expected = default_topology(grids)
    wrong = {
        name: list(topology.get(name, []))
        for name in dict.fromkeys([*grids, *topology])
        if list(topology.get(name, [])) != expected.get(name, [])
    }
    return [
        f"topology sends {name} to {targets or 'nothing'}; Megatron's MimoModel sends every "
        f"encoder to {LANGUAGE!r} and {LANGUAGE!r} nowhere: use {expected}"
        for name, targets in wrong.items()
        if LANGUAGE in grids
    ]


def _bridges(
    grids: Mapping[str, ModuleGrid], topology: Topology
) -> list[tuple[ModuleGrid, ModuleGrid]]:
    return [
        (grids[source], grids[target])
        for source, targets in topology.items()
        for target in targets
        if source in grids and target in grids
    ]


def _bridge_problems(source: ModuleGrid, target: ModuleGrid) -> list[str]:
    problems = [
        f"module {grid} has CP {grid.dim('cp')}, but Megatron's bridge between {source.name} and "
        f"{target.name} needs CP 1 on both sides: set context_parallel_size to 1"
        for grid in (source, target)
        if grid.dim("cp") > 1
    ]
    sizes = source.data_parallel_size, target.data_parallel_size
    if max(sizes) % min(sizes):
        problems.append(
            f"{source.name} has DP {sizes[0]} and {target.name} has DP {sizes[1]}: neither divides "
            f"the other, so no whole number of ranks sends to each; choose data_parallel_size so "
            f"that one is a multiple of the other"
        )
    return problems


def batch_problems(
    grids: Iterable[ModuleGrid],
    global_batch_size: int,
    micro_batch_size: int,
    num_microbatches: int,
) -> list[str]:
    """What keeps a batch from being dealt out to a layout.

    Args:
        grids: where each module lies.
        global_batch_size: samples in an optimizer step, over all ranks.
        micro_batch_size: samples in a microbatch over all ranks, before data-parallel slicing.
        num_microbatches: microbatches in an optimizer step.
    """
    sizes = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "num_microbatches": num_microbatches,
    }
    problems = [
        f"{name} must be a positive integer, got {value!r}"
        for name, value in sizes.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if problems:
        return problems
    for grid in grids:
        dp = grid.data_parallel_size
        problems += [
            f"{name} {value} is not divisible by the DP {dp} of module {grid.name}; use a multiple "
            f"of {dp}, or another data_parallel_size"
            for name, value in list(sizes.items())[:2]
            if value % dp
        ]
    if num_microbatches * micro_batch_size != global_batch_size:
        problems.append(
            f"num_microbatches {num_microbatches} x micro_batch_size {micro_batch_size} = "
            f"{num_microbatches * micro_batch_size}, not the global_batch_size "
            f"{global_batch_size}; change one of the three (micro_batch_size counts the samples "
            f"of all ranks)"
        )
    return problems


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise one ``ValueError`` that lists every problem, or return if there is none."""
    if problems:
        raise ValueError("\n".join([f"{what}:", *(f"  - {problem}" for problem in problems)]))


# -- what follows from it --------------------------------------------------------------------------


def data_parallel_slice(micro_batch_size: int, grid: ModuleGrid, rank: int) -> slice:
    """Samples of a microbatch that a rank of a module reads: equal, consecutive parts in DP order.

    Bridges send consecutive parts too, so a fan-in or fan-out needs no reordering.

    Raises:
        ValueError: the microbatch does not divide by the module's DP, or the rank is elsewhere.

    Example:
        >>> vision = ModuleGrid("vision", (1, 1, 2, 1), DIM_NAMES, rank_offset=4)
        >>> data_parallel_slice(8, vision, rank=5)
        slice(4, 8, None)
    """
    raise_problems(
        "the microbatch cannot be dealt out",
        batch_problems([grid], micro_batch_size, micro_batch_size, 1)[:1],
    )
    if rank not in grid.ranks:
        raise ValueError(
            f"rank {rank} is not in module {grid}; ask on one of its ranks, or for another module"
        )
    count = micro_batch_size // grid.data_parallel_size
    start = grid.coordinate(rank, "dp") * count
    return slice(start, start + count)


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
    """
    return (1.0 if ddp_sums else float(replicas)) / (1 if per_token else language_replicas)


def describe(
    grids: Mapping[str, ModuleGrid],
    factors: Mapping[str, float],
    per_token: bool,
    micro_batch_size: int | None = None,
) -> str:
    """A layout as a table of text: ranks, sizes, samples, scaling and bridge of each module."""
    language = grids[LANGUAGE].data_parallel_size
    rows: list[tuple[str, ...]] = [
        ("module", "ranks", "TP", "CP", "PP", "DP", "samples/rank", "gradient x", "bridge")
    ]
    for name, grid in grids.items():
        dp = grid.data_parallel_size
        share = f"1/{dp}" if micro_batch_size is None else f"{micro_batch_size / dp:g}"
        factor = f"{factors[name]:g}" + ("/tokens" if per_token else "")
        sizes = (str(grid.dim(dim)) for dim in ("tp", "cp", "pp", "dp"))
        rows.append((name, span(grid.ranks), *sizes, share, factor, _bridge(grid, language)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    ranks = max(grid.ranks.stop for grid in grids.values())
    batch = "a microbatch" if micro_batch_size is None else f"{micro_batch_size} samples"
    how = "colocated" if is_colocated(grids.values()) else "on disjoint ranks"
    loss = "per token" if per_token else f"mean over {grids[LANGUAGE].replicas} language replica(s)"
    return "\n".join([f"{ranks} ranks, modules {how}; {batch} at a time; loss {loss}", *lines])


def _bridge(grid: ModuleGrid, language_dp: int) -> str:
    """Direction of the bridge to the language model, as DP to DP."""
    if grid.name == LANGUAGE:
        return ""
    dp = grid.data_parallel_size
    kind = "fan-in" if dp > language_dp else "fan-out" if dp < language_dp else "one to one"
    return f"{kind} {dp}:{language_dp}"
