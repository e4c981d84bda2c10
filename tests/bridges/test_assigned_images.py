"""Images that any encoder rank may have encoded: their tokens and gradients find their way."""

import cases
import pytest
from attrs import evolve
from cases import Case
from layouts import LAYOUTS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

from megatron_mimo_coord.bridges import incoming

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
    "some, ahead": Case(modules=LAYOUTS["fan-in"], assign=2, assign_ahead=True),
    "two encoders": Case(
        modules={"vision": parallel(dp=2), "audio": parallel(dp=2), "language": parallel(dp=2)},
        assign=1,
    ),
}
SENSITIVE = {
    "disjoint": LAYOUTS["equal"],
    "colocated": {name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_oracles(case):
    images = {name: SKEWED[name] for name in case.encoders}
    case = evolve(case, images=images, steps=2)
    assert sum(world(case.world_size).run("cases:check", case)) > 0, repr(case)


@pytest.mark.parametrize("layout", SENSITIVE.values(), ids=SENSITIVE)
def test_images_may_have_any_number_of_tokens(layout):
    images = {"vision": (((8, 0, 3, 0), (0, 1, 8, 2)),)}  # of 0, 2, 4 and 10 tokens, in this order
    case = Case(modules=layout, images=images, assign=1, tiles=(0, 1, 2, 5), no_optimizer=True)
    world(case.world_size).run("cases:check", case)


# -- routes that are broken on purpose -------------------------------------------------------------


def _parts_turned(whole):
    """The images of each sender, each in the place of the next."""
    return evolve(whole, parts=tuple(evolve(p, runs=p.runs[1:] + p.runs[:1]) for p in whole.parts))


def _tokens():
    whole = incoming.TargetEnd._whole
    return "_whole", lambda *args: _parts_turned(whole(*args))


def _gradients():
    returns = incoming.TargetEnd.returns
    return "returns", lambda end, gradient, whole: returns(end, gradient, _parts_turned(whole))


MUTANTS = {"tokens": _tokens, "gradients": _gradients}


def _is_caught(case, mutant):
    with cases._replaced(incoming.TargetEnd, *MUTANTS[mutant]()):
        try:
            cases.check(evolve(case, rehearse=False))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("layout", SENSITIVE.values(), ids=SENSITIVE)
def test_images_in_each_others_places_are_noticed(layout, mutant):
    images = {"vision": (((5, 2, 1, 3),),)}
    case = Case(modules=layout, images=images, assign=1, num_microbatches=1, no_optimizer=True)
    case = evolve(case, tiles=(0, 1, 2, 5))  # of several sizes: several runs
    assert any(world(case.world_size).run(_is_caught, case, mutant))
