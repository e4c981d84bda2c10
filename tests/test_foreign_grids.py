"""Grids that someone else made: other dims, in another order."""

from typing import Any

import pytest
from ranks import world


def _token_counters(dims: list[str], shape: list[int]) -> Any:
    """(counts tokens, replicas, slice of eight samples) of this rank for a language grid."""
    import torch.distributed as dist

    from megatron_mimo_coord.coordinator import MultiModuleCoordinator
    from megatron_mimo_coord.layout import ModuleGrid
    from megatron_mimo_coord.layout.batch import data_parallel_slice

    grid = ModuleGrid("language", shape, dims)
    holder = MultiModuleCoordinator.__new__(MultiModuleCoordinator)
    holder._grids = {"language": grid}
    holder._rank = dist.get_rank()
    here = holder._rank in grid.ranks
    samples = data_parallel_slice(8, grid, holder._rank) if here else None
    return holder._is_token_counter(), grid.replicas, samples


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
    answers = world(4).run("test_foreign_grids:_token_counters", dims, shape)
    counted = [samples for counts, _, samples in answers if counts]
    assert sorted((part.start, part.stop) for part in counted) == [(0, 4), (4, 8)]
    assert {replicas for _, replicas, _ in answers} == {2}
