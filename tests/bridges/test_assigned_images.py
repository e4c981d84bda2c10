"""Images that any encoder rank may have encoded: their tokens and gradients find their way."""

import pytest
from attrs import evolve
from cases import Case
from layouts import LAYOUTS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

SKEWED = {
    "vision": (((5, 0, 1, 0), (0, 0, 0, 0), (0, 0, 1, 4)), ((1, 1, 1, 1), (3, 0, 0, 0))),
    "audio": (((0, 0, 2, 0), (1, 0, 0, 0)),),
}
CASES = {
    "fan-in": Case(modules=LAYOUTS["fan-in"], assign=1, evaluate=True),
    "fan-out": Case(modules=LAYOUTS["fan-out, tensor parallel"], assign=1, evaluate=True),
    "equal": Case(modules=LAYOUTS["equal"], assign=2, ddp={**OVERLAP, **SHARDED}),
    "lanes": Case(modules=LAYOUTS["encoder tensor parallel"], assign=2, per_token=PER_TOKEN),
    "stages": Case(
        modules={"vision": parallel(pp=2, dp=2), "language": parallel(dp=2)},
        assign=1,
        num_microbatches=4,
    ),
    "four to two": Case(modules={"vision": parallel(dp=4), "language": parallel(dp=2)}, assign=1),
    "two encoders": Case(
        modules={"vision": parallel(dp=2), "audio": parallel(dp=2), "language": parallel(dp=2)},
        assign=1,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_oracles(case):
    images = {name: SKEWED[name] for name in case.encoders}
    case = evolve(case, images=images, steps=2)
    assert sum(world(case.world_size).run("cases:check", case)) > 0, repr(case)
