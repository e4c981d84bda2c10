"""Which encoder rank encodes which image: dealt out by cost, so that none waits for the slowest."""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import accumulate, chain, compress, pairwise
from math import ceil, gcd, inf
from operator import ne
from typing import Any
from zlib import crc32

from attrs import field, frozen

from megatron_mimo_coord.layout.grids import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.parallelism import shown

Nested = tuple[tuple[float, ...], ...]
"""A number for each image of each sample: [sample][image]."""

# Loads this close to the least possible are not improved on: no step would show it. Beyond the
# second, all is dealt out anew, which moves most images.
CLOSE, FAR = 1.002, 1.02
# Bounds on the work, in comparisons and not in time: every rank has to find the same.
MAX_TRIES = 2000
MAX_TOGETHER = 64
FEW, SEARCH_TRIES = 32, 6000  # images among which a depth-first search can get anywhere


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
        loads: list[float] = [0] * self.data_parallel_size
        for owner, cost in zip(
            chain.from_iterable(self.owners), chain.from_iterable(self.costs), strict=True
        ):
            loads[owner] += cost
        return tuple(loads)

    @cached_property
    def tokens_of_ranks(self) -> tuple[int, ...]:
        """Tokens that the encoder makes on each data-parallel rank."""
        tokens = [0] * self.data_parallel_size
        for owner, count in zip(
            chain.from_iterable(self.owners), chain.from_iterable(self.tokens), strict=True
        ):
            tokens[owner] += count
        return tuple(tokens)

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
) -> ImageAssignment:
    """Deal a microbatch's images out to the data-parallel ranks of an encoder, by cost.

    No communication: every rank works out the same from the same numbers. An image leaves the
    slice of samples that its rank would read (:func:`~.batch.data_parallel_slice`) only to lower
    the largest load. That load is

    - at most mean + (1 - 1/DP) x the largest cost: 1.05 x mean if no image costs more than 5 % of
      it (or 0.2 % above the least that whole images can add up to, if that is more);
    - at most 4/3 - 1/(3 DP) of the least possible, as by Graham's longest processing time first
      (https://doi.org/10.1137/0117039), and the least possible for up to eight images on three
      ranks. On real data it is within 2 % of the least possible.

    Args:
        grid: where the encoder lies.
        rank: this global rank, in the grid or not.
        tokens: for every sample of the microbatch, all ranks' samples in order, the number of
            tokens of each of its images.
        costs: what encoding each image costs in any unit, nested alike; ``tokens`` if left out.
        sample_ids: a number or a string for each sample, by which ranks find out that their
            samples differ.

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
    owners = tuple(_deal_out(flat, ends[len(counts) // dp - 1 :: len(counts) // dp]))
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


def _deal_out(costs: Sequence[float], ends: list[int]) -> list[int]:
    """Owner of each image.

    Args:
        costs: of each image, in the order of the microbatch.
        ends: for each rank, the end of its slice of the images.
    """
    ranks = len(ends)
    slices: list[int] = []
    for rank, end in enumerate(ends):
        slices += [rank] * (end - len(slices))
    by_cost = sorted(range(len(costs)), key=costs.__getitem__)
    homes = list(map(slices.__getitem__, by_cost))
    best = _Loads(list(map(costs.__getitem__, by_cost)), homes, ranks)
    least = _least_possible(best.costs, ranks)
    if max(best.loads) <= least:
        return slices
    best.shed(least)
    best.improve(least * CLOSE)
    if max(best.loads) > least * FAR:
        other = _Loads(best.costs, _longest_first(best.costs, ranks), ranks)
        other.improve(least * CLOSE)
        best = min(best, other, key=lambda loads: max(loads.loads))
    if len(costs) <= FEW and max(best.loads) > least:
        owners = _search(best.costs, homes, ranks, max(best.loads), least)
        best = best if owners is None else _Loads(best.costs, owners, ranks)
    best.go_home(homes)
    for image, owner in zip(by_cost, best.owners, strict=True):
        slices[image] = owner
    return slices


# From here on images are numbered by cost, ascending: those of a rank, in order, are so too.


def _least_possible(costs: list[float], ranks: int) -> float:
    """A load that some rank has at least, whoever deals out.

    The mean, rounded up to what whole images can add up to; and j of the largest (j - 1) x ranks
    + 1 images: some rank has as many of them. (With many on a rank that is hardly above the mean.)
    """
    total = sum(costs)
    least = total / ranks
    if type(total) is int:  # and so are all costs
        unit = gcd(*costs) or 1
        least = -(-total // (ranks * unit)) * unit
    together = min(MAX_TOGETHER, ceil(len(costs) / ranks))
    sums = list(accumulate(costs[: -(together - 1) * ranks - 2 : -1], initial=0))
    for j in range(1, together + 1):
        end = (j - 1) * ranks + 1
        least = max(least, sums[end] - sums[end - j])
    return least


def _longest_first(costs: list[float], ranks: int) -> list[int]:
    """Owners by Graham's rule: from the largest image on, each to the rank with the least."""
    owners = [0] * len(costs)
    heap = [(0.0, rank) for rank in range(ranks)]
    for image in reversed(range(len(costs))):
        load, rank = heap[0]
        owners[image] = rank
        heapreplace(heap, (load + costs[image], rank))
    return owners


class _Loads:
    """An assignment that is being improved: what each rank carries, and what of."""

    def __init__(self, costs: list[float], owners: list[int], ranks: int) -> None:
        self.costs = costs
        self.owners = list(owners)
        self.loads: list[float] = [0] * ranks
        self.images: list[list[int]] = [[] for _ in range(ranks)]  # ascending
        for image, owner in enumerate(owners):
            self.images[owner].append(image)
        for rank, images in enumerate(self.images):
            self.loads[rank] = sum(map(costs.__getitem__, images))

    def move(self, images: list[int], rank: int) -> None:
        """Move neighbors of one cost from the rank that has them."""
        first, number = images[0], len(images)
        cost, source = self.costs[first] * number, self.owners[first]
        place = bisect_left(self.images[source], first)
        del self.images[source][place : place + number]
        place = bisect_left(self.images[rank], first)
        self.images[rank][place:place] = images
        self.loads[source] -= cost
        self.loads[rank] += cost
        for image in images:
            self.owners[image] = rank

    def _alike(self, rank: int, image: int, number: float) -> list[int]:
        """Up to so many of a rank's images that cost what this one does, this one the last."""
        images, cost = self.images[rank], self.costs[image]
        end = bisect_right(images, image)
        start = bisect_left(images, bisect_left(self.costs, cost), 0, end)
        return images[max(start, end - max(1, int(min(number, end)))) : end]

    def shed(self, level: float) -> None:
        """Move images from ranks above a level to those below, the largest that fit: few move."""
        rooms = [(load - level, rank) for rank, load in enumerate(self.loads) if load < level]
        heapify(rooms)
        largest_room = -rooms[0][0] if rooms else 0
        moving, costs = [], self.costs
        for source, images in enumerate(self.images):
            while (surplus := self.loads[source] - level) > 0:
                place = bisect_left(images, bisect_right(costs, min(surplus, largest_room))) - 1
                if place < 0 or not (cost := costs[images[place]]):
                    break
                alike = images[place : place + 1]
                if place and costs[images[place - 1]] == cost < surplus:
                    alike = self._alike(source, images[place], surplus / cost)
                del images[place + 1 - len(alike) : place + 1]
                self.loads[source] -= cost * len(alike)
                moving += alike
        for image in sorted(moving, reverse=True):
            room, target = rooms[0]
            self.images[target].append(image)
            self.loads[target] += costs[image]
            self.owners[image] = target
            heapreplace(rooms, (room + costs[image], target))
        for images in self.images:
            images.sort()

    def improve(self, enough: float) -> None:
        """Lower the largest load by moves, then by exchanges, until it is enough or none helps."""
        order = sorted((load, rank) for rank, load in enumerate(self.loads))
        tries = MAX_TRIES
        while order[-1][0] > enough and tries > 0:
            tries -= 4
            largest, source = order.pop()
            place = order[0]
            gap = largest - place[0]
            image = self._to_move(source, gap)
            if image is not None:
                number = min(gap / 2, largest - enough) / self.costs[image]
                self.move(self._alike(source, image, number), place[1])
            else:
                for place in order:
                    tries -= len(self.images[source]) + len(self.images[place[1]])
                    pair = self._to_swap(source, place[1], enough) if tries > 0 else None
                    if pair is not None:
                        self.move([pair[0]], place[1])
                        self.move([pair[1]], source)
                        break
                else:
                    return
            order.remove(place)
            for rank in (source, place[1]):
                insort(order, (self.loads[rank], rank))

    def _to_move(self, source: int, gap: float) -> int | None:
        """The image whose move leaves the two ranks closest, if any lowers the larger load."""
        images, costs = self.images[source], self.costs
        if not images or costs[images[0]] >= gap:
            return None
        place = bisect_left(images, bisect_left(costs, gap / 2))
        near = [i for i in images[max(place - 1, 0) : place + 1] if 0 < costs[i] < gap]
        return min(near, key=lambda image: abs(costs[image] - gap / 2), default=None)

    def _to_swap(self, source: int, target: int, enough: float) -> tuple[int, int] | None:
        """The first exchange that leaves neither rank above enough.

        Else the one that leaves the two ranks closest, if any lowers the larger load.
        """
        half = (self.loads[source] - self.loads[target]) / 2
        tolerated = enough - (self.loads[source] + self.loads[target]) / 2
        best, pair = half, None
        costs, theirs = self.costs, iter(self.images[target])
        other = next(theirs, None)
        for image in self.images[source]:  # both ascend, so none is to be compared again
            wanted = costs[image] - half
            while other is not None:
                off = costs[other] - wanted
                if abs(off) < best:
                    best, pair = abs(off), (image, other)
                if off >= 0:
                    break
                other = next(theirs, None)
            if best <= tolerated:
                break
        return pair

    def go_home(self, homes: list[int]) -> None:
        """Return images to their slices where the largest load allows it; large ones first."""
        self._swap_alike(homes)
        largest, loads, owners, costs = max(self.loads), self.loads, self.owners, self.costs
        away = list(compress(range(len(homes)), map(ne, owners, homes)))[::-1]
        self._swap(away[:MAX_TRIES], homes, largest)
        while back := [
            i for i in away if owners[i] != homes[i] and self._fits(i, homes[i], largest)
        ]:
            for image in back:  # one that returns leaves room for others
                if self._fits(image, homes[image], largest):
                    loads[owners[image]] -= costs[image]
                    loads[homes[image]] += costs[image]
                    owners[image] = homes[image]

    def _fits(self, image: int, rank: int, largest: float) -> bool:
        return self.loads[rank] + self.costs[image] <= largest

    def _swap_alike(self, homes: list[int]) -> None:
        """Of images that cost the same, each rank that has any gets those of its slice."""
        for cost in set(self.costs[:: len(self.costs) // MAX_TOGETHER + 1]):  # finds the long runs
            start, end = bisect_left(self.costs, cost), bisect_right(self.costs, cost)
            number = Counter(self.owners[start:end])
            others: list[int] = []
            for home, images in Counter(homes[start:end]).items():  # in order, as slices are
                stay = min(number[home], images)
                number[home] -= stay
                self.owners[start : start + stay] = [home] * stay
                others += range(start + stay, start + images)
                start += images
            for image, owner in zip(others, number.elements(), strict=True):
                self.owners[image] = owner

    def _swap(self, away: list[int], homes: list[int], largest: float) -> None:
        """Return images in exchange for such that return the other way."""
        loads, owners, costs = self.loads, self.owners, self.costs
        waiting: dict[tuple[int, int], list[int]] = {}
        for image in away:
            home, owner, cost = homes[image], owners[image], costs[image]
            others = waiting.get((home, owner))
            # The last that waits costs least, and no less than this one.
            if others and loads[owner] + (change := costs[others[-1]] - cost) <= largest:
                loads[owner] += change
                loads[home] -= change
                owners[image], owners[others.pop()] = home, owner
            else:
                waiting.setdefault((owner, home), []).append(image)


def _search(
    costs: list[float], homes: list[int], ranks: int, largest: float, least: float
) -> list[int] | None:
    """Owners with a smaller largest load, if a bounded depth-first search finds some.

    Exact for a handful of images, where rules of thumb are worst.
    """
    order = range(len(costs))[::-1]  # from the largest on
    owners, loads = list(homes), [0.0] * ranks
    best: list[int] | None = None
    tries = SEARCH_TRIES

    def place(depth: int) -> bool:
        """Place the images from depth on; whether to stop."""
        nonlocal best, largest, tries
        if depth == len(order):
            best, largest = list(owners), max(loads)
            return largest <= least
        image = order[depth]
        cost, home = costs[image], homes[image]
        seen = set()
        for rank in sorted(range(ranks), key=lambda rank: (loads[rank], rank != home)):
            load = loads[rank]
            tries -= 1
            if tries < 0:
                return True
            if load in seen or load + cost >= largest:
                continue  # ranks with the same load are as good as each other
            seen.add(load)
            loads[rank], owners[image] = load + cost, rank
            if place(depth + 1):
                return True
            loads[rank] = load
        return False

    place(0)
    return best
