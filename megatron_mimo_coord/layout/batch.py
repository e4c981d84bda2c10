"""How a batch is dealt out: every module takes the whole of it, in equal parts for its DP ranks."""

from collections.abc import Iterable

from megatron_mimo_coord.layout.fields import is_count, shown
from megatron_mimo_coord.layout.grids import ModuleGrid
from megatron_mimo_coord.layout.problems import Problem, raise_problems


def batch_problems(
    grids: Iterable[ModuleGrid],
    global_batch_size: int | None,
    micro_batch_size: int,
    num_microbatches: int | None = None,
) -> list[Problem]:
    """What keeps a batch from being dealt out to a layout.

    Args:
        grids: where each module lies.
        global_batch_size: samples in an optimizer step, over all ranks; None if it is not known.
        micro_batch_size: samples in a microbatch over all ranks, before data-parallel slicing.
        num_microbatches: microbatches in an optimizer step; None for as many as the batch makes.

    Example:
        >>> vision = ModuleGrid("vision", (4,), ("dp",))
        >>> print(*batch_problems([vision], 512, 30), sep="\\n")
        micro_batch_size 30 is not divisible by the DP 4 of module vision; use a multiple of 4, \
or another data_parallel_size
        global_batch_size 512 is not a multiple of micro_batch_size 30; change one of the two
    """
    sizes = {"micro_batch_size": micro_batch_size}
    if global_batch_size is not None:
        sizes = {"global_batch_size": global_batch_size, **sizes}
    numbers = sizes if num_microbatches is None else {**sizes, "num_microbatches": num_microbatches}
    problems = [
        Problem(
            f"{name} must be a positive integer below 2**31, got {shown(value)}; give a number of "
            f"{'microbatches' if name == 'num_microbatches' else 'samples'}",
            ("", name),
        )
        for name, value in numbers.items()
        if not is_count(value)
    ]
    if problems:
        return problems
    for grid in grids:
        dp = grid.data_parallel_size
        problems += [
            Problem(
                f"{name} {value} is not divisible by the DP {dp} of module {grid.name}; use a "
                f"multiple of {dp}, or another data_parallel_size",
                (grid.name, "data_parallel_size"),
                ("", name),
            )
            for name, value in sizes.items()
            if value % dp
        ]
    if global_batch_size is None:
        return problems
    if num_microbatches is None and global_batch_size % micro_batch_size:
        problems.append(
            Problem(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size}; change one of the two",
                ("", "global_batch_size"),
                ("", "micro_batch_size"),
            )
        )
    if num_microbatches and num_microbatches * micro_batch_size != global_batch_size:
        problems.append(
            Problem(
                f"num_microbatches {num_microbatches} x micro_batch_size {micro_batch_size} = "
                f"{num_microbatches * micro_batch_size}, not the global_batch_size "
                f"{global_batch_size}; change one of the three (micro_batch_size counts the "
                f"samples of all ranks)"
            )
        )
    return problems


def data_parallel_slice(micro_batch_size: int, grid: ModuleGrid, rank: int) -> slice:
    """Samples of a microbatch that a rank of a module reads: equal, consecutive parts in DP order.

    Bridges send consecutive parts too, so a fan-in or fan-out needs no reordering.

    Raises:
        ValueError: the microbatch does not divide by the module's DP, or the rank is elsewhere.

    Example:
        >>> vision = ModuleGrid("vision", (1, 1, 2, 1), ("tp", "cp", "dp", "pp"), rank_offset=4)
        >>> data_parallel_slice(8, vision, rank=5)
        slice(4, 8, None)
    """
    raise_problems(
        "the microbatch cannot be dealt out",
        batch_problems([grid], micro_batch_size, micro_batch_size)[:1],
    )
    if rank not in grid.ranks:
        raise ValueError(
            f"rank {rank} is not in module {grid}; ask on one of its ranks, or for another module"
        )
    count = micro_batch_size // grid.data_parallel_size
    start = grid.coordinate(rank, "dp") * count
    return slice(start, start + count)
