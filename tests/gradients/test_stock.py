"""Stock Megatron modules with configs of their own train like one process."""

import pytest
from layouts import parallel
from ranks import world
from stock import RECOMPUTE, StockCase

SEQUENCE_PARALLEL = {"sequence_parallel": True}


def verify(case: StockCase) -> None:
    try:
        assert sum(world(case.world_size).run("stock:check", case)) > 0
    except AssertionError as error:
        error.add_note(f"to run it again: verify({case!r})")
        raise


FAN_IN = {"vision": parallel(dp=2), "language": parallel()}
FAN_OUT = {"vision": parallel(), "language": parallel(dp=2)}
ALL_IN_ONE = {"vision": (((0, 0, 5, 0), (0, 0, 0, 0)), ((0, 0, 0, 1), (3, 0, 0, 0)))}
UNKIND = {"images": ALL_IN_ONE, "lengths": (0, 1, 6, 2)}
"""Samples without text, of one token, and cut off; all images in one sample."""

CASES = {
    "fan-in": StockCase(modules=FAN_IN, steps=2, per_token={"language": True}),
    "fan-out": StockCase(modules=FAN_OUT, steps=2, ddp={"use_distributed_optimizer": True}),
    "sequence-parallel language model": StockCase(
        modules={"vision": parallel(dp=2), "language": parallel(tp=2)},
        configs={"language": SEQUENCE_PARALLEL},
        steps=2,
    ),
    "recompute": StockCase(
        modules=FAN_IN, configs={"vision": RECOMPUTE, "language": RECOMPUTE}, steps=2
    ),
    "unkind data, fan-in": StockCase(modules=FAN_IN, steps=3, **UNKIND),
    "unkind data, fan-out": StockCase(modules=FAN_OUT, steps=3, **UNKIND),
    "NaN in an image": StockCase(modules=FAN_IN, steps=3, nan_step=1),
    "a layer's norms alone": StockCase(
        modules=FAN_OUT, steps=2, frozen=("vision.", "language."), trainable=("0.input_layernorm",)
    ),
    "frozen embeddings": StockCase(modules=FAN_IN, steps=2, frozen=("language.embedding",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whole_steps(case):
    verify(case)
