"""Images dealt out by cost: complete, level, close to home, and the same everywhere."""

import random
import statistics
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.layout.image_assignment import assign_images


def encoder(dp, tp=1, pp=1, rank_offset=0):
    return ModuleGrid("vision", (tp, dp, pp), ("tp", "dp", "pp"), rank_offset)


COSTS = st.integers(0, 1024) | st.floats(0, 1e6)


@st.composite
def microbatches(draw, cost=COSTS, ranks=8, images=5):
    """(DP, costs of each image of each sample)."""
    dp = draw(st.integers(1, ranks))
    samples = dp * draw(st.integers(1, 4))
    nested = st.lists(st.lists(cost, max_size=images), min_size=samples, max_size=samples)
    return dp, draw(nested)


def assigned(dp, costs, **more):
    return assign_images(encoder(dp), 0, [[1] * len(row) for row in costs], costs, **more)


def homes(assignment):
    """(home, owner, cost) of each image."""
    samples = len(assignment.tokens) // assignment.data_parallel_size
    return [
        (sample // samples, owner, cost)
        for sample, owners in enumerate(assignment.owners)
        for owner, cost in zip(owners, assignment.costs[sample], strict=True)
    ]


@given(microbatches())
def test_each_image_has_one_owner_and_keeps_its_order(case):
    dp, costs = case
    assignment = assigned(dp, costs)
    parts = [assign_images(encoder(dp), rank, assignment.tokens, costs) for rank in range(dp)]
    everything = [(s, i) for s, row in enumerate(costs) for i in range(len(row))]
    assert sorted(pair for part in parts for pair in part.local) == everything
    for rank, part in enumerate(parts):
        assert part == assignment and list(part.local) == sorted(part.local)
        assert part.loads[rank] == pytest.approx(sum(costs[s][i] for s, i in part.local))


def test_a_step_is_dealt_out_as_a_whole():
    dice, ratios = random.Random(0), []
    for _ in range(50):
        dp, loads, largest = dice.choice([2, 4, 8]), None, 0.0
        for _ in range(dice.choice([4, 8])):
            counts = [min(16, int(dice.lognormvariate(0.6, 1.0))) for _ in range(2 * dp)]
            costs = [[dice.choice([16, 64, 256]) for _ in range(n)] for n in sorted(counts)]
            more = assigned(dp, costs, carried=loads).loads
            loads = [sum(both) for both in zip(loads or [0] * dp, more, strict=True)]
            largest = max([largest, *(cost for row in costs for cost in row)])
        mean = sum(loads) / dp
        assert max(loads) <= mean + (1 - 1 / dp) * largest
        ratios.append(max(loads) / mean)
    assert statistics.median(ratios) <= 1.01  # 1.05 with each microbatch by itself


def test_ranks_of_one_replica_are_fed_alike_and_others_nothing():
    grid = encoder(2, tp=2, pp=2, rank_offset=3)
    local = [assign_images(grid, rank, [[3, 1], [2]]).local for rank in range(13)]
    first, second = ((0, 0),), ((0, 1), (1, 0))
    assert local == [()] * 3 + [first, first, second, second] * 2 + [()] * 2


@given(microbatches())
def test_the_largest_load_is_bounded_by_the_largest_image(case):
    dp, costs = case
    assignment = assigned(dp, costs)
    flat = [cost for row in costs for cost in row]
    mean = sum(flat) / dp
    bound = max(1.002 * least(flat, dp), mean + (1 - 1 / dp) * max(flat, default=0))
    assert max(assignment.loads) <= bound * (1 + 1e-9)
    expected = max(assignment.loads) / mean if mean else 1.0
    assert assignment.imbalance == pytest.approx(expected)


@given(microbatches(cost=st.integers(0, 20), ranks=3, images=1))
def test_few_images_are_dealt_out_within_grahams_bound(case):
    dp, costs = case
    costs = costs[: 8 - 8 % dp]
    flat = [cost for row in costs for cost in row]
    best = min(
        max(sum(c for c, o in zip(flat, owners, strict=True) if o == rank) for rank in range(dp))
        for owners in product(range(dp), repeat=len(flat))
    )
    assert best <= max(assigned(dp, costs).loads) <= (4 / 3 - 1 / (3 * dp)) * best + 1e-9


def test_a_dozen_images_are_level_where_they_can_be():
    costs = [[], [37], [34, 52], [37, 42, 65], [87, 9], [28, 41, 42], [88], []]
    assert assigned(4, costs).imbalance < 1.02


def least(costs, dp):
    """What a load is at least: the mean, or j of the largest (j - 1) x DP + 1 images."""
    ordered = sorted(costs, reverse=True)
    together = (ordered[(j - 1) * dp + 1 - j : (j - 1) * dp + 1] for j in range(1, len(costs) + 1))
    crowded = [sum(part) for j, part in enumerate(together, 1) if (j - 1) * dp < len(costs)]
    return max([sum(costs) / dp, *crowded])


@pytest.mark.parametrize("tokens", ["256", "64 to 1024", "powers of two"])
@pytest.mark.parametrize("dp", [2, 4, 8, 16, 64])
def test_skewed_data_is_level(dp, tokens):
    # Log-normal images per sample, at most 16, as web pages and interleaved documents have them.
    generator = random.Random(dp)
    draw = {
        "256": lambda: 256,
        "64 to 1024": lambda: generator.randint(64, 1024),
        "powers of two": lambda: 2 ** generator.randint(6, 10),
    }[tokens]
    before, after = 0.0, 0.0
    for _ in range(8):
        costs = [
            [draw() for _ in range(min(16, int(generator.lognormvariate(0.6, 1.0))))]
            for _ in range(max(16, 4 * dp))
        ]
        assignment = assigned(dp, costs)
        flat = [cost for row in costs for cost in row]
        mean, bound = sum(flat) / dp, least(flat, dp)
        assert assignment.imbalance <= max(1.05, bound / mean + 1e-9), (costs, assignment.loads)
        slices = [0] * dp
        for home, _, cost in homes(assignment):
            slices[home] += cost
        before, after = before + max(slices) / mean / 8, after + assignment.imbalance / 8
    assert after < 1.1 < 1.15 < before


@given(microbatches())
def test_no_image_is_away_from_its_slice_for_nothing(case):
    assignment = assigned(*case)
    largest = max(assignment.loads)
    for home, owner, cost in homes(assignment):
        if home != owner:
            assert assignment.loads[home] + cost > largest * (1 - 1e-9)


@given(microbatches(cost=st.just(7)))
def test_of_equal_images_as_few_move_as_can(case):
    assignment = assigned(*case)
    before = [0] * assignment.data_parallel_size
    for home, _, cost in homes(assignment):
        before[home] += cost
    moved = sum(home != owner for home, owner, _ in homes(assignment))
    level = max(assignment.loads)
    assert level == 7 * -(-sum(before) // (7 * len(before)))
    assert moved * 7 == sum(max(0, load - level) for load in before)


def test_digests_name_what_differs_in_every_process():
    one = assign_images(encoder(2), 0, [[4], [5, 6]], sample_ids=["a", 17])
    assert one.digest == 1692755205116694333
    for other in ({"tokens": [[4], [5, 7]]}, {"sample_ids": ["a", 18]}, {"sample_ids": None}):
        given = {"tokens": [[4], [5, 6]], "sample_ids": ["a", 17]} | other
        two = assign_images(encoder(2), 1, **given)
        assert two.digest != one.digest and two.sample_digests[1] != one.sample_digests[1]
    again = assign_images(encoder(1), 5, ((4,), (5, 6)), [[1], [1, 1]], ("a", 17))
    assert again.digest == one.digest and again.sample_digests == one.sample_digests


def test_ids_that_hash_alike_have_digests_of_their_own():
    ids = [-1, -2, 0, 2**61 - 1, "0", None]
    one = assigned(1, [[] for _ in ids], sample_ids=ids)
    assert len(set(one.sample_digests)) == len(ids)
    assert all(-(2**63) <= digest < 2**63 for digest in (one.digest, *one.sample_digests))


@pytest.mark.parametrize("order", ["as drawn", "sorted"])
@pytest.mark.parametrize("dp", [2, 4, 8])
@pytest.mark.parametrize("large", [10**6, 5000])
def test_thousands_of_images_of_two_costs_are_dealt_out_at_once(large, dp, order):
    generator = random.Random(dp)
    flat = [large if generator.random() < 0.02 else 1 for _ in range(4096)]
    if order == "sorted":
        flat.sort()
    costs = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    lines = 0

    def count(frame, event, arg):
        nonlocal lines
        lines += 1
        return count

    tracing = sys.gettrace()
    sys.settrace(count)
    try:
        assignment = assigned(dp, costs)
    finally:
        sys.settrace(tracing)
    assert lines < 150_000, "counted, not timed: lines of Python"
    assert max(assignment.loads) <= 1.002 * least(flat, dp)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [[1], [1], [1]]}, "3 samples, which the DP 2 of module vision does not divide"),
        ({"tokens": []}, "0 samples"),
        ({"tokens": [3, 4]}, r"nested \[sample\]\[image\]"),
        ({"tokens": 3}, r"nested \[sample\]\[image\]"),
        ({"tokens": [[1], [-2]]}, r"tokens\[1\]\[0\] must be a number of tokens.*got -2"),
        ({"tokens": [[1.5], []]}, r"tokens\[0\]\[0\] must be .*got 1.5; give plain"),
        ({"tokens": [[True], []]}, "got True"),
        ({"costs": [[1.0], [float("nan"), 1]]}, r"costs\[1\]\[0\] must be a finite cost.*got nan"),
        ({"costs": [[1.0], [float("inf"), 1]]}, "got inf"),
        ({"costs": [[1.0], ["2", 1]]}, "got '2'"),
        ({"costs": [[1.0], [1e308, 1e308]]}, "add up to inf; give them in a larger unit"),
        ({"costs": [[1.0], [1]]}, "at sample 1 for 1 images, but tokens has 2: give one cost"),
        ({"costs": [[1.0]]}, "for 1 samples, but tokens has 2"),
        ({"sample_ids": [1]}, "names 1 samples, but tokens has 2"),
    ],
)
def test_wrong_use_is_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        assign_images(encoder(2), 0, **{"tokens": [[1], [1, 1]]} | change)
