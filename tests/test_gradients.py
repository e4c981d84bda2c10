"""Every module's gradient is that of the one loss: real ranks against one process."""

import pytest
from cases import Case
from ranks import world

from megatron_mimo_coord import ModuleParallelism


def parallel(tp: int = 1, pp: int = 1, dp: int = 1, **more: int) -> ModuleParallelism:
    return ModuleParallelism(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        **more,
    )


LAYOUTS = {
    "fan-in": {"vision": parallel(dp=2), "language": parallel()},
    "fan-in, pipeline": {"vision": parallel(dp=2), "language": parallel(pp=2)},
    "fan-out": {"vision": parallel(), "language": parallel(dp=2)},
    "fan-out, tensor parallel": {"vision": parallel(), "language": parallel(tp=2, dp=2)},
    "equal": {"vision": parallel(dp=2), "language": parallel(dp=2)},
    "two encoders": {"vision": parallel(dp=2), "audio": parallel(), "language": parallel()},
    "encoder tensor parallel": {"vision": parallel(tp=2), "language": parallel(dp=2)},
    "encoder pipeline": {"vision": parallel(pp=2, dp=2), "language": parallel()},
    "colocated": {
        "vision": parallel(dp=2, rank_offset=0),
        "language": parallel(tp=2, rank_offset=0),
    },
    "colocated, fan-out": {
        "vision": parallel(tp=2, rank_offset=0),
        "language": parallel(dp=2, rank_offset=0),
    },
}
LOSSES = {
    "mean": {},
    "per token": {"vision": True, "audio": True, "language": True},
    "language per token": {"language": True},
    "encoders per token": {"vision": True, "audio": True},
}


def verify(case: Case) -> None:
    assert sum(world(case.world_size).run("cases:check", case)) > 0, repr(case)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_losses(layout, loss):
    verify(Case(modules=layout, per_token=loss, steps=1))


def test_encoders_on_the_same_ranks():
    # Without get_mimo_optimizer: it gathers over the world once a module, so that ranks with two
    # modules wait for ever for ranks with one.
    layout = {
        "vision": parallel(dp=2, rank_offset=0),
        "audio": parallel(dp=2, rank_offset=0),
        "language": parallel(rank_offset=2),
    }
    verify(Case(modules=layout, no_optimizer=True, num_microbatches=3))
