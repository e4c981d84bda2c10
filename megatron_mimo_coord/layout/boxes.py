"""Boxes in tensors: what part of a whole tensor a rank holds, and where two parts overlap.

The distributed optimizer gives each replica a range of a weight's elements in memory order, which
is in general no box; it is a few: the end of a row, whole rows, the beginning of a row.

Nothing here needs torch.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from attrs import field, frozen


def _integers(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


@frozen
class Box:
    """A part of a tensor: from ``offset``, ``size`` elements in each dim."""

    offset: tuple[int, ...] = field(converter=_integers)
    size: tuple[int, ...] = field(converter=_integers)

    @property
    def volume(self) -> int:
        """Elements inside."""
        return math.prod(self.size)

    def overlap(self, other: "Box") -> "Box | None":
        """What is in both, None where there is nothing.

        Example:
            >>> Box((0, 2), (2, 2)).overlap(Box((1, 0), (3, 3)))
            Box(offset=(1, 2), size=(1, 1))
        """
        first = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = zip(self.offset, self.size, other.offset, other.size, strict=True)
        size = [min(a + n, b + m) - at for at, (a, n, b, m) in zip(first, ends, strict=True)]
        return Box(first, size) if all(number > 0 for number in size) else None

    def slices_of(self, part: "Box") -> tuple[slice, ...]:
        """Where a part of this box lies inside a tensor that holds this box.

        Example:
            >>> Box((4, 0), (2, 8)).slices_of(Box((5, 2), (1, 3)))
            (slice(1, 2, None), slice(2, 5, None))
        """
        starts = [a - b for a, b in zip(part.offset, self.offset, strict=True)]
        return tuple(
            slice(start, start + number) for start, number in zip(starts, part.size, strict=True)
        )


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` to ``stop`` of a tensor in memory order, as boxes in that order.

    Args:
        shape: of the tensor.
        start: first element.
        stop: behind the last element.

    Example:
        >>> for box in boxes_of_range((4, 3), 2, 10):
        ...     print(box.offset, box.size)
        (0, 2) (1, 1)
        (1, 0) (2, 3)
        (3, 0) (1, 1)
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row, rest = math.prod(shape[1:]), shape[1:]
    first, last = min(-(-start // row) * row, stop), max(stop // row * row, start)
    for begin, end in pairwise(sorted({start, first, last, stop})):
        at = begin // row
        if begin % row == end % row == 0:
            yield Box((at, *(0 for _ in rest)), ((end - begin) // row, *rest))
        else:  # inside one row
            for box in boxes_of_range(rest, begin - at * row, end - at * row):
                yield Box((at, *box.offset), (1, *box.size))
