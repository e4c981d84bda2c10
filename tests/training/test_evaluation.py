"""An evaluation sees the weights of the last step, and leaves no trace in the training."""

from contextlib import suppress
from typing import Any

import pytest
from cases import Case
from layouts import MANY_BUCKETS, PER_TOKEN, SHARDED, VARYING, parallel
from ranks import world

STEPS = 3


def train_and_evaluate(case: Case) -> dict[str, Any]:
    """Losses of steps, with and without evaluations between them; the modes of the model."""
    import torch
    from trainings import training

    with training(case) as one:
        undisturbed = [one.steps(step)[0] for step in range(STEPS)]
    with training(case) as one:
        [*one.model.modules()][-1].eval()
        modes = [part.training for part in one.model.modules()]
        losses, evaluated, inside = [], [], []
        for step in range(STEPS):
            evaluated.append(one.evaluate(step))
            losses += one.steps(step)
            with suppress(ZeroDivisionError), one.coordinator.evaluation():
                assert not any(part.training for part in one.model.modules())
                assert not torch.is_grad_enabled()
                inside.append(one.fingerprint())
                raise ZeroDivisionError
        assert [part.training for part in one.model.modules()] == modes
        assert torch.is_grad_enabled()
    return {"undisturbed": undisturbed, "losses": losses, "evaluated": evaluated, "inside": inside}


@pytest.mark.parametrize(
    ("case", "replicas"),
    [
        (
            Case(
                modules={"vision": parallel(dp=2), "language": parallel(dp=2)},
                ddp={**MANY_BUCKETS, **SHARDED, "overlap_param_gather": True},
                images=VARYING,
                per_token=PER_TOKEN,
            ),
            [(0, 1), (2, 3)],
        ),
        (
            Case(
                modules={
                    "vision": parallel(dp=2, tp=2, rank_offset=0),
                    "language": parallel(dp=2, tp=2, rank_offset=0),
                },
            ),
            [(0, 2), (1, 3)],
        ),
    ],
    ids=["gathered late", "colocated"],
)
def test_an_evaluation_leaves_no_trace(case, replicas):
    ranks = world(4).run(train_and_evaluate, case)
    for one, other in replicas:
        # Each updated a part of the weights, and inside both have all of them.
        assert ranks[one]["inside"] == ranks[other]["inside"]
        assert len(set(map(tuple, ranks[one]["inside"]))) == STEPS
    for found in ranks:
        assert found["losses"] == found["undisturbed"]
        # Before a step is taken, its data has the same loss in an evaluation.
        assert found["evaluated"] == [loss for loss, _ in found["losses"]]


# -- a loader that runs ahead ----------------------------------------------------------------------


def _evaluate(case, is_made_inside):
    """An evaluation whose loader has assigned one microbatch more than were read; its losses."""
    import cases
    from attrs import evolve
    from trainings import training

    def ahead(coordinator):
        data = [cases.draw(case, 0, index) for index in range(case.num_microbatches)]
        assign = lambda each: evolve(each, assignments=cases._assign(case, coordinator, each))  # noqa: E731
        waiting = [assign(data[0])]  # as soon as the loader is made

        def read():
            for following in data[1:]:
                waiting.append(assign(following))
                yield waiting.pop(0)
            yield waiting.pop(0)

        return read()

    with training(case) as one:
        plain = one.evaluate(0)
        before = None if is_made_inside else ahead(one.coordinator)
        with one.coordinator.evaluation():
            data = before or ahead(one.coordinator)
            losses = one.run_on(data, forward_only=True)
        return plain, one.coordinator.reduce_losses(losses)["loss"]


SHARED_OR_NOT = {
    "disjoint": {name: parallel(dp=2) for name in ("vision", "language")},
    "colocated": {name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")},
}


@pytest.mark.parametrize("layout", SHARED_OR_NOT.values(), ids=SHARED_OR_NOT)
def test_what_an_evaluation_runs_is_assigned_inside_it(layout):
    images = {"vision": (((5, 0, 1, 0), (1, 2, 0, 0), (0, 3, 0, 4)),)}
    case = Case(modules=layout, images=images, assign=1, num_microbatches=3)
    for plain, ahead in world(case.world_size).run(_evaluate, case, True):
        assert ahead == pytest.approx(plain, rel=1e-6)
    _, errors = world(case.world_size).try_run(_evaluate, case, False)
    said = [text for _, text in errors.values() if "1 microbatches of vision were assigned" in text]
    assert said, errors
