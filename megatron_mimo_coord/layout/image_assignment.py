"""Which encoder rank encodes which image: dealt out by cost, so that none waits for the slowest."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from functools import cached_property
from heapq import heapreplace
from itertools import accumulate, chain, groupby, pairwise
from math import gcd, inf
from typing import Any
from zlib import crc32

from attrs import field, frozen

from megatron_mimo_coord.layout.fields import shown
from megatron_mimo_coord.layout.grids import LANGUAGE, ModuleGrid

Nested = tuple[tuple[float, ...], ...]
"""A number for each image of each sample: [sample][image]."""

# Loads this close to the least possible are not improved on: no step would show it. Beyond the
# second, all is dealt out anew, which moves most images.
CLOSE, FAR = 1.002, 1.02
# Bounds on the work, in comparisons and not in time: every rank has to find the same.
MAX_TRIES = 2000
MAX_TOGETHER = 64


@frozen
class ImageAssignment:
    """Which data-parallel rank of an encoder encodes each image of a microbatch.

    Args:
        module: the encoder.
        tokens: tokens of each image, [sample][image].
        costs: cost of each image, nested alike.
        sample_ids: what the trainer calls each sample; None if it was not said.
        owners: data-parallel rank that encodes each image, nested alike.
        data_parallel_size: DP of the encoder.
        dp_rank: this rank's index among them; None on a rank that does not hold the encoder.
    """

    module: str
    tokens: tuple[tuple[int, ...], ...]
    costs: Nested
    sample_ids: tuple[Any, ...] | None
    owners: tuple[tuple[int, ...], ...]
    data_parallel_size: int
    dp_rank: int | None = field(default=None, eq=False)  # ranks compare their assignments

    @cached_property
    def local(self) -> tuple[tuple[int, int], ...]:
        """(sample, image) pairs in the order in which this rank's encoder must be fed.

        The order of the microbatch: images of one sample, and of one language rank's samples, are
        neighbors. Empty on a rank that does not hold the encoder.
        """
        return () if self.dp_rank is None else self.images_of(self.dp_rank)

    def images_of(self, dp_rank: int) -> tuple[tuple[int, int], ...]:
        """(sample, image) pairs of one data-parallel rank, in the order it is fed."""
        return tuple(
            (sample, image)
            for sample, owners in enumerate(self.owners)
            if dp_rank in owners
            for image, owner in enumerate(owners)
            if owner == dp_rank
        )

    @cached_property
    def loads(self) -> tuple[float, ...]:
        """Cost of each data-parallel rank."""
        return self._by_rank(self.costs)

    @cached_property
    def tokens_here(self) -> int | None:
        """Tokens that this rank's encoder is to make; None on a rank that does not hold it."""
        return None if self.dp_rank is None else self._by_rank(self.tokens)[self.dp_rank]

    def _by_rank[N: float](self, values: Sequence[Sequence[N]]) -> tuple[N, ...]:
        """Numbers of images, added up for each data-parallel rank."""
        sums: list[Any] = [0] * self.data_parallel_size
        owners = chain.from_iterable(self.owners)
        for owner, value in zip(owners, chain.from_iterable(values), strict=True):
            sums[owner] += value
        return tuple(sums)

    @property
    def imbalance(self) -> float:
        """Largest load / mean load; 1.0 if nothing costs anything."""
        total = sum(self.loads)
        return max(self.loads) * self.data_parallel_size / total if total else 1.0

    @cached_property
    def sample_digests(self) -> tuple[int, ...]:
        """For each sample 64 bits of its tokens and its id: two ranks find where they differ.

        The same in every process: Python hashes tokens alike everywhere, and ids, of which it
        hashes some alike (-1 and -2), are told apart by what they look like.
        """
        ids = self.sample_ids or [None] * len(self.tokens)
        looks = [crc32(repr(id).encode()) for id in ids]
        return tuple(map(hash, zip(self.tokens, looks, strict=True)))

    @cached_property
    def digest(self) -> int:
        """64 bits of the tokens and the sample ids, the same in every process."""
        return hash(self.sample_digests)


def encoder_grid(grids: Mapping[str, ModuleGrid], name: str) -> ModuleGrid:
    """Where an encoder lies.

    Raises:
        ValueError: there is no encoder of that name.
    """
    encoders = [module for module in grids if module != LANGUAGE]
    if name not in encoders:
        raise ValueError(f"there is no encoder {name!r}; the encoders are {', '.join(encoders)}")
    return grids[name]


def assign_images(
    grid: ModuleGrid,
    rank: int,
    tokens: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]] | None = None,
    sample_ids: Sequence[Any] | None = None,
    carried: Sequence[float] | None = None,
) -> ImageAssignment:
    """Deal a microbatch's images out to the data-parallel ranks of an encoder, by cost.

    No communication: every rank works out the same from the same numbers. An image leaves the
    slice of samples that its rank would read (:func:`~.batch.data_parallel_slice`) only to lower
    the largest load. That load is

    - at most mean + (1 - 1/DP) x the largest cost: 1.05 x mean if no image costs more than 5 % of
      it (or 0.2 % above the least that whole images can add up to, if that is more);
    - at most 4/3 - 1/(3 DP) of the least possible, as by Graham's longest processing time first
      (https://doi.org/10.1137/0117039). On real data it is within 2 % of the least possible.

    Args:
        grid: where the encoder lies.
        rank: this global rank, in the grid or not.
        tokens: for every sample of the microbatch, all ranks' samples in order, the number of
            tokens of each of its images.
        costs: what encoding each image costs in any unit, nested alike; ``tokens`` if left out.
        sample_ids: a number or a string for each sample, by which ranks find out that their
            samples differ.
        carried: what each data-parallel rank has already, of the step's earlier microbatches: who
            has less gets more.

    Raises:
        ValueError: a number of tokens or a cost is not one, the nesting differs, or the samples do
            not divide by the encoder's DP.

    Example:
        >>> vision = ModuleGrid("vision", (2,), ("dp",))
        >>> assignment = assign_images(vision, 1, [[8, 8, 8], [8], [], []])
        >>> assignment.local, assignment.loads, assignment.imbalance
        (((0, 2), (1, 0)), (16, 16), 1.0)
    """
    dp = grid.data_parallel_size
    flat: Sequence[float]
    counts, flat = _nested(tokens, "tokens", (int,), "a number of tokens, an integer from 0 on")
    weights: Nested = counts
    if costs is not None:
        weights, flat = _nested(costs, "costs", (int, float), "a finite cost, from 0 on")
        _refuse_other_nesting(counts, weights)
    if sample_ids is not None and len(sample_ids) != len(counts):
        raise ValueError(
            f"sample_ids names {len(sample_ids)} samples, but tokens has {len(counts)}: give "
            f"one id for each sample of the microbatch, or leave sample_ids out"
        )
    if len(counts) % dp or not counts:
        raise ValueError(
            f"tokens has {len(counts)} samples, which the DP {dp} of module {grid.name} does not "
            f"divide into equal slices; pass all ranks' samples of the microbatch, some multiple "
            f"of {dp}, samples without images as empty lists"
        )
    ends = list(accumulate(map(len, counts)))  # of each sample's images, and so of each slice's
    slices = ends[len(counts) // dp - 1 :: len(counts) // dp]
    owners = tuple(_deal_out(flat, slices, carried or [0.0] * dp))
    return ImageAssignment(
        grid.name,
        counts,
        weights,
        None if sample_ids is None else tuple(sample_ids),
        tuple([owners[start:end] for start, end in pairwise([0, *ends])]),
        dp,
        grid.coordinate(rank, "dp") if rank in grid.ranks else None,
    )


def _nested[N: float](
    values: Sequence[Sequence[N]], name: str, types: tuple[type, ...], needed: str
) -> tuple[tuple[tuple[N, ...], ...], list[N]]:
    """The same as tuples, and as one list, if all are plain numbers."""
    try:
        nested = tuple(map(tuple, values))
    except TypeError:
        raise ValueError(
            f"{name} must be nested [sample][image], such as [[256, 256], [], [64]], got "
            f"{shown(values)[:200]}"
        ) from None
    flat = list(chain.from_iterable(nested))
    # One pass each in C; bool is an int to Python, and a tensor would be read on the host.
    if set(map(type, flat)) <= set(types) and min(flat, default=0) >= 0 and sum(flat) < inf:
        return nested, flat
    for sample, images in enumerate(nested):
        for image, value in enumerate(images):
            if type(value) not in types or not 0 <= value < inf:
                raise ValueError(
                    f"{name}[{sample}][{image}] must be {needed}, got {shown(value)}; give plain "
                    f"Python numbers, as tolist() makes them"
                )
    raise ValueError(f"{name} add up to {sum(flat)}; give them in a larger unit")


def _refuse_other_nesting(
    tokens: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]
) -> None:
    if list(map(len, tokens)) == list(map(len, costs)):
        return
    if len(tokens) != len(costs):
        where, counts = "for", f"{len(costs)} samples, but tokens has {len(tokens)}"
    else:
        sample = next(i for i, images in enumerate(tokens) if len(images) != len(costs[i]))
        where = f"at sample {sample} for"
        counts = f"{len(costs[sample])} images, but tokens has {len(tokens[sample])}"
    raise ValueError(
        f"costs has numbers {where} {counts}: give one cost for each image, or leave costs out to "
        f"deal out by tokens"
    )


# -- the arithmetic: from costs and slices to owners -----------------------------------------------


def _deal_out(costs: Sequence[float], ends: list[int], carried: Sequence[float]) -> list[int]:
    """Owner of each image.

    Args:
        costs: of each image, in the order of the microbatch.
        ends: for each rank, the end of its slice of the images.
        carried: load of each rank beforehand.
    """
    slices: list[int] = []
    for rank, end in enumerate(ends):
        slices += [rank] * (end - len(slices))
    by_cost = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    ordered, homes = [costs[image] for image in by_cost], [slices[image] for image in by_cost]
    least = max(_least_possible(ordered, len(ends)), _filled(carried, sum(costs)))
    best = _Deal(ordered, homes, carried, least)
    best.exchange(least * CLOSE)
    if best.largest > least * FAR:
        anew = _Deal(ordered, homes, carried, -1)
        anew.exchange(least * CLOSE)
        best = min(best, anew, key=lambda deal: deal.largest)
    best.go_home()
    for image, owner in zip(by_cost, best.owners, strict=True):
        slices[image] = owner
    return slices


def _least_possible(costs: list[float], ranks: int) -> float:
    """A load that some rank has at least, whoever deals out; costs from the largest on.

    The mean, rounded up to what whole images can add up to; and j of the largest (j - 1) x ranks
    + 1 images: some rank has as many of them. (With many on a rank that is hardly above the mean.)
    """
    total = sum(costs)
    least = total / ranks
    if type(total) is int:  # and so are all costs
        unit = gcd(*costs) or 1
        least = -(-total // (ranks * unit)) * unit
    sums = list(accumulate(costs[: MAX_TOGETHER * ranks], initial=0))
    for j, end in enumerate(range(1, len(sums), ranks), 1):
        least = max(least, sums[end] - sums[end - j])
    return least


def _filled(carried: Sequence[float], total: float) -> float:
    """The largest load if a total of grains, however small, goes to ranks that have least.

    Example:
        >>> _filled([6, 0, 0], 4), _filled([3, 0, 0], 9)
        (6, 4.0)
    """
    loads = sorted(carried)
    total += sum(loads)
    while total <= loads[-1] * len(loads) and len(loads) > 1:
        total -= loads.pop()
    return max(total / len(loads), *carried)


class _Deal:
    """Longest first, an image stays in its slice up to a level; else it goes to who has least.

    Args:
        costs: of each image, from the largest on.
        homes: rank of each image's slice.
        carried: load of each rank beforehand.
        level: load up to which images stay; below 0 none does, which is Graham's rule.
    """

    def __init__(
        self, costs: list[float], homes: list[int], carried: Sequence[float], level: float
    ) -> None:
        self.costs, self.homes, self.owners = costs, homes, list(homes)
        self.loads = loads = list(carried)
        heap = sorted((load, rank) for rank, load in enumerate(carried))
        for cost, images in groupby(range(len(costs)), costs.__getitem__):
            away = []
            for image in images:
                if loads[homes[image]] + cost <= level:
                    loads[homes[image]] += cost
                else:
                    away.append(image)
            for image in away:
                while heap[0][0] < loads[rank := heap[0][1]]:  # loads only grow: bring up to date
                    heapreplace(heap, (loads[rank], rank))
                loads[rank] += cost
                self.owners[image] = rank

    @property
    def largest(self) -> float:
        """The largest load."""
        return max(self.loads)

    def exchange(self, enough: float) -> None:
        """Lower the largest load by an image, for a smaller one or none, until it is enough."""
        images: list[list[int]] = [[] for _ in self.loads]
        for image, owner in enumerate(self.owners):
            images[owner].append(image)
        tries = MAX_TRIES
        while self.largest > enough and tries > 0:
            source, *others = sorted(range(len(images)), key=lambda rank: -self.loads[rank])
            for target in reversed(others):
                tries -= len(images[source])
                pair = self._pair(images[source], images[target], source, target)
                if pair is not None:
                    break
            else:
                return
            for moved, here, there in ((pair[0], source, target), (pair[1], target, source)):
                if moved is not None:
                    images[here].remove(moved)
                    insort(images[there], moved)
                    self._move(moved, there)

    def _pair(
        self, mine: list[int], theirs: list[int], source: int, target: int
    ) -> tuple[int, int | None] | None:
        """The exchange that leaves two ranks closest, if any lowers the larger load."""
        half = (self.loads[source] - self.loads[target]) / 2
        best, pair = half * (1 - 1e-9), None
        negative = [-self.costs[image] for image in theirs]
        for cost, image in {self.costs[image]: image for image in mine}.items():
            wanted = cost - half
            place = bisect_left(negative, -wanted)
            for other in (*theirs[max(place - 1, 0) : place + 1], None):
                off = abs(wanted - (0 if other is None else self.costs[other]))
                if off < best:
                    best, pair = off, (image, other)
        return pair

    def go_home(self) -> None:
        """Return images to their slices where the largest load allows it; large ones first."""
        largest = self.largest
        while back := [
            image
            for image, home in enumerate(self.homes)
            if self.owners[image] != home and self.loads[home] + self.costs[image] <= largest
        ]:
            for image in back:  # one that returns leaves room for others
                if self.loads[self.homes[image]] + self.costs[image] <= largest:
                    self._move(image, self.homes[image])

    def _move(self, image: int, rank: int) -> None:
        self.loads[self.owners[image]] -= self.costs[image]
        self.loads[rank] += self.costs[image]
        self.owners[image] = rank
