"""Which rows go where, for any layout and data: arithmetic of bridges."""

from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.bridges.routes import assigned, bridge_ends, in_turn, peers_in_turn, takers
from megatron_mimo_coord.layout import DIM_NAMES, ModuleGrid
from megatron_mimo_coord.layout.image_assignment import assign_images

POWERS = st.sampled_from([1, 2, 4])


@st.composite
def microbatches(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    """(DP of the encoder, DP of the language model, tokens of each image of each sample)."""
    sources, targets = draw(POWERS), draw(POWERS)
    number = 4 * draw(st.integers(1, 3))
    images = st.lists(st.integers(0, 3), max_size=4)
    return sources, targets, draw(st.lists(images, min_size=number, max_size=number))


@given(microbatches())
def test_each_target_gets_its_samples_in_order(microbatch):
    sources, targets, tokens = microbatch
    grid = ModuleGrid("vision", (sources,), ("dp",))
    share = len(tokens) // targets
    received = [{} for _ in range(targets)]
    for source in range(sources):
        assignment = assign_images(grid, source, tokens)
        output = [(s, i, t) for s, i in assignment.local for t in range(tokens[s][i])]
        deliveries = assigned(assignment, source, targets)
        assert [each.target for each in deliveries] == list(range(targets))
        for each in deliveries:
            rows = iter(output[each.start : each.start + each.rows])
            for start, count in each.runs:
                received[each.target] |= {start + row: next(rows) for row in range(count)}
            assert not list(rows)
            assert (source in each.senders) == (each.rows > 0)
            # Neighbors are one run: as few pieces as can be.
            assert all(sum(one) < other[0] for one, other in pairwise(each.runs))
    for target, rows in enumerate(received):
        expected = [
            (s, i, t)
            for s in range(target * share, (target + 1) * share)
            for i, count in enumerate(tokens[s])
            for t in range(count)
        ]
        assert [rows[row] for row in range(len(rows))] == expected
        assert assigned(assignment, 0, targets)[target].total_rows == len(expected)


@given(POWERS, POWERS, POWERS, POWERS, POWERS, POWERS)
def test_every_lane_receives_from_one_lane_of_each_rank_in_turn(tp, pp, dp, tp2, pp2, dp2):
    vision = ModuleGrid("vision", (tp, 1, dp, pp), DIM_NAMES)
    language = ModuleGrid("language", (tp2, 1, dp2, pp2), DIM_NAMES, rank_offset=vision.size)
    sources, targets = bridge_ends(vision, language)
    assert len({*chain(*sources), *chain(*targets)}) == tp * dp + tp2 * dp2
    assert all(vision.coordinate(rank, "pp") == pp - 1 for rank in chain(*sources))
    assert all(language.coordinate(rank, "pp") == 0 for rank in chain(*targets))
    for source in range(dp):
        for target in range(dp2):
            is_in_turn = target in peers_in_turn(source, dp, dp2)
            assert is_in_turn == (source in peers_in_turn(target, dp2, dp))
            # Consecutive slices: those that overlap meet.
            assert is_in_turn == (
                source * dp2 < (target + 1) * dp and target * dp < (source + 1) * dp2
            )
    taken = [rank for lane in sources[0] for rank in takers(lane, sources[0], targets[0])]
    assert sorted(taken) == sorted(targets[0])


@given(st.lists(st.integers(0, 5), max_size=5))
def test_parts_in_turn_are_consecutive(sizes):
    parts = in_turn(range(len(sizes)), sizes)
    assert [each.rows for each in parts] == sizes
    assert all(one.start + one.rows == other.start for one, other in pairwise(parts))


def test_a_header_survives_its_journey():
    import torch

    header = Header(
        microbatch=3,
        dtype=torch.bfloat16,
        shape=(4, 8),
        wants_gradient=True,
        digests=(11, 12),
        runs=((0, 1), (5, 3)),
        total_rows=9,
        senders=(0, 2),
    )
    assert Header.unpack(header.pack()) == header
    bare = Header(microbatch=0, dtype=torch.float32, shape=(0, 8), wants_gradient=False)
    assert Header.unpack(bare.pack()) == bare
