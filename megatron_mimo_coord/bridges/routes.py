"""Which rank sends which rows to which: arithmetic of one bridge, in plain integers.

Rows are those of an encoder's output ``[tokens, hidden]``; where a module hands over ``[sequence,
batch, hidden]`` they are the samples.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

from attrs import frozen

from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.layout.image_assignment import ImageAssignment

Run = tuple[int, int]
"""(first row, number of rows)"""

Lanes = tuple[tuple[int, ...], ...]
"""Global ranks, [data-parallel rank][lane]."""


def bridge_ends(source: ModuleGrid, target: ModuleGrid) -> tuple[Lanes, Lanes]:
    """The ranks of a module's last stage that send, and of another's first stage that receive.

    Ranks of one data-parallel rank hold the same tensors; they are its lanes. Each lane has one
    lane of each data-parallel rank on the other side to receive from, so nothing is broadcast.
    """
    return _lanes(source, source.dim("pp") - 1), _lanes(target, 0)


def _lanes(grid: ModuleGrid, stage: int) -> Lanes:
    lanes: list[list[int]] = [[] for _ in range(grid.data_parallel_size)]
    for rank in grid.ranks:
        if grid.coordinate(rank, "pp") == stage:
            lanes[grid.coordinate(rank, "dp")].append(rank)
    return tuple(map(tuple, lanes))


def peers_in_turn(mine: int, here: int, there: int) -> range:
    """Peers of one of ``here`` ranks among ``there`` as long as nothing is assigned.

    Equal, consecutive parts of the samples, or a shared one.

    Example:
        >>> peers_in_turn(1, 2, 4), peers_in_turn(3, 4, 2)
        (range(2, 4), range(1, 2))
    """
    if here >= there:
        return range(mine // (here // there), mine // (here // there) + 1)
    return range(mine * (there // here), (mine + 1) * (there // here))


def takers(rank: int, lanes: Sequence[int], there: Sequence[int]) -> list[int]:
    """Ranks on the other side that take from one of these lanes; one that is a lane has its own.

    Example:
        >>> takers(0, [0, 1], [4, 5, 6]), takers(0, [0, 1], [0, 1, 2]), takers(1, [0, 1], [0, 1, 2])
        ([4, 6], [2, 0], [1])
    """
    in_turn = there[lanes.index(rank) :: len(lanes)]  # so that each takes from one
    return [other for other in in_turn if other not in lanes] + [rank] * (rank in there)


@frozen
class Delivery:
    """What one source has for one target.

    Args:
        target: data-parallel rank of the target.
        start, rows: which rows of the source's output.
        runs: where they go, if an assignment says so: (first row in the target's tensor, number
            of rows).
        total_rows: rows of the target's tensor then, from all sources; else 0.
        senders: data-parallel ranks of all sources that have rows for this target.
    """

    target: int
    start: int
    rows: int
    runs: tuple[Run, ...] = ()
    total_rows: int = 0
    senders: tuple[int, ...] = ()


def in_turn(targets: Iterable[int], sizes: Sequence[int]) -> list[Delivery]:
    """Consecutive parts of an output, of the given sizes.

    Example:
        >>> in_turn([2, 3], [5, 1])[1].start
        5
    """
    starts = accumulate(sizes, initial=0)
    return [Delivery(*each) for each in zip(targets, starts, sizes, strict=False)]


def assigned(assignment: ImageAssignment, source: int, targets: int) -> list[Delivery]:
    """What a data-parallel rank of the encoder has for each of the language model's.

    Example:
        >>> from megatron_mimo_coord.layout.image_assignment import assign_images
        >>> vision = ModuleGrid("vision", (2,), ("dp",))
        >>> one, two = assigned(assign_images(vision, 1, [[8, 8, 8], [8], [], []]), 1, targets=2)
        >>> one.start, one.rows, one.runs, one.total_rows, two.rows
        (0, 16, ((16, 16),), 32, 0)
    """
    share = len(assignment.tokens) // targets
    deliveries, start = [], 0
    for target in range(targets):
        samples = slice(target * share, (target + 1) * share)
        counts = chain.from_iterable(assignment.tokens[samples])
        owners = chain.from_iterable(assignment.owners[samples])
        runs: list[Run] = []
        senders = set()
        row = 0
        for count, owner in zip(counts, owners, strict=True):
            if count:
                senders.add(owner)
                if owner == source and runs and sum(runs[-1]) == row:
                    runs[-1] = runs[-1][0], runs[-1][1] + count
                elif owner == source:
                    runs.append((row, count))
            row += count
        rows = sum(count for _, count in runs)
        deliveries.append(Delivery(target, start, rows, tuple(runs), row, tuple(sorted(senders))))
        start += rows
    return deliveries
