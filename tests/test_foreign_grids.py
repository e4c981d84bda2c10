"""Grids that someone else made: other dims, in another order."""

import pytest

from megatron_mimo_coord.gradients.num_tokens import holds_a_distinct_count
from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.layout.batch import data_parallel_slice


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (["tp", "cp", "pp", "dp"], [2, 1, 1, 2]),
        (["tp", "cp", "dp", "pp"], [1, 1, 2, 2]),
        (["tp", "cp", "ep", "pp", "dp"], [1, 1, 2, 1, 2]),
        (["dp", "pp", "tp"], [2, 2, 1]),
    ],
)
def test_each_sample_is_counted_once(dims, shape):
    grid = ModuleGrid("language", shape, dims)
    counted = [
        data_parallel_slice(8, grid, rank)
        for rank in grid.ranks
        if holds_a_distinct_count(grid, rank)
    ]
    assert sorted((part.start, part.stop) for part in counted) == [(0, 4), (4, 8)]
    assert grid.replicas == 2
    assert grid.unknown_dims == []
