"""Losses of the last stage become one dict of numbers on every rank."""

from typing import Any

import pytest
from cases import Case, built
from layouts import LAYOUTS
from ranks import world


def _reduce(losses: list) -> dict[str, float]:
    import torch

    infra, _, coordinator = built(
        Case(modules={name: LAYOUTS["fan-out"][name] for name in ("vision", "language")})
    )
    here = torch.distributed.get_rank()
    try:
        return dict(coordinator.reduce_losses(losses[here]))
    finally:
        infra.destroy()


def test_losses_are_the_same_on_every_rank():
    # rank 0 is vision, ranks 1 and 2 are the two replicas of the language model
    losses = [
        [],
        [{"pair": [6.0, 2.0], "number": 1.0}, {"pair": [0.0, 0.0], "number": 2.0}],
        [{"number": 3.0, "pair": [1.0, 5.0]}, {"number": 6.0}],
    ]
    for answer in world(3).run("test_losses:_reduce", losses):
        assert answer == {"pair": 1.0, "number": 3.0}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"loss": [1.0, 2.0, 3.0]}, {"loss": 1.0}, "loss 'loss' has 3 values"),
        (
            {"loss": 1.0},
            {"loss": 1.0, "z": 2.0},
            "language: names of the losses: rank 1 has loss, rank 2 has loss, z",
        ),
        (
            {"loss": 1.0},
            {f"loss of expert {index}": 1.0 for index in range(65)},
            "there are 65 losses with names of",
        ),
    ],
    ids=["values", "names", "number"],
)
def test_losses_that_cannot_be_averaged_are_refused_on_every_rank(first, second, message):
    losses = [[], [first], [second]]
    answers, errors = world(3).try_run("test_losses:_reduce", losses)
    assert not answers
    assert all(message in text for _, text in errors.values())


def _reduce_and_look(case: Case) -> dict[str, Any]:
    """Collectives and host waits of reduce_losses, before and after someone looks."""
    import json
    import pickle

    import torch
    from counting import Counter

    infra, _, coordinator = built(case)
    scores = torch.tensor([6.0, 3.0])
    losses = [{"loss": scores}, {"loss": (scores.sum(), scores[1]), "accuracy": 0.5}]
    coordinator.reduce_losses([])  # whatever is done once
    with Counter() as before:
        metrics = coordinator.reduce_losses(losses)
    with Counter() as after:
        value = metrics["loss"]
    fresh = [coordinator.reduce_losses(losses) for _ in range(9)]
    infra.destroy()
    expected = {"loss": 2.5, "accuracy": 0.5}
    return {
        "collectives": [name for name, _ in before.collectives],
        "waits": len(before.syncs),
        "later": [name for name, _ in after.collectives],
        "value": value,
        "is one": [
            isinstance(fresh[0], dict) and bool(fresh[0]),
            json.loads(json.dumps(fresh[1])) == expected,
            fresh[2] == expected and expected == fresh[3] and fresh[4] == fresh[5],
            repr(fresh[6]) == repr(expected),
            pickle.loads(pickle.dumps(fresh[7])) == expected,
            {**fresh[8], "step": 1} == {**expected, "step": 1},
        ],
    }


def test_losses_take_one_collective_of_numbers_and_no_wait():
    for answer in world(3).run("test_losses:_reduce_and_look", Case(modules=LAYOUTS["fan-out"])):
        assert [name for name in answer["collectives"] if "allgather" in name]
        assert len(answer["collectives"]) == 1
        assert answer["waits"] == 0 and answer["later"] == []
        assert answer["value"] == 2.5
        assert all(answer["is one"]), answer["is one"]


def test_no_tokens_are_a_loss_of_zero():
    losses = [[], [{"loss": [0.0, 0.0]}], [{"loss": [0.0, 0.0]}]]
    assert world(3).run("test_losses:_reduce", losses) == [{"loss": 0.0}] * 3
