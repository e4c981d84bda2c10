"""Ranges of elements as boxes, and plain data as JSON: arithmetic that checkpoints rest on."""

import itertools
import json
import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo_coord.layout.boxes import Box, boxes_of_range

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def elements(shape: tuple[int, ...], box: Box) -> list[int]:
    """Numbers, in memory order, of the elements of a box in a tensor."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    ranges = [range(at, at + n) for at, n in zip(box.offset, box.size, strict=True)]
    return [
        sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in itertools.product(*ranges)
    ]


@given(SHAPES, st.data())
def test_boxes_are_the_range_and_few(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = list(boxes_of_range(shape, start, stop))
    found = [number for box in boxes for number in elements(shape, box)]
    assert found == list(range(start, stop)), "each element once, in memory order"
    assert sum(box.volume for box in boxes) == stop - start
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@st.composite
def boxes(draw, dims):
    offset = draw(st.tuples(*[st.integers(0, 3)] * dims))
    return Box(offset, draw(st.tuples(*[st.integers(0, 3)] * dims)))


@given(st.integers(0, 3).flatmap(lambda dims: st.tuples(boxes(dims), boxes(dims))))
def test_the_overlap_is_what_is_in_both(pair):
    one, other = pair
    whole = tuple(6 for _ in one.offset)
    both = set(elements(whole, one)) & set(elements(whole, other))
    overlap = one.overlap(other)
    assert (set(elements(whole, overlap)) if overlap else set()) == both
    if overlap:
        inside = one.slices_of(overlap)
        assert [part.stop - part.start for part in inside] == list(overlap.size)
        assert [part.start + at for part, at in zip(inside, one.offset, strict=True)] == list(
            overlap.offset
        )


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value):
    import torch

    from megatron_mimo_coord.training.plain_data import decode, encode

    blobs: dict[str, bytes] = {}
    text = json.dumps(encode(value, "extra", blobs))
    found = decode(
        json.loads(text), lambda digest: torch.tensor([*blobs[digest]], dtype=torch.uint8)
    )
    assert found == value
    assert repr(found) == repr(value), "tuples stay tuples, and floats floats"
