"""A frozen encoder that runs ahead of the language model changes when, and nothing else."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cases
import pytest
from attrs import evolve
from cases import Case
from layouts import PER_TOKEN, VARYING, parallel
from ranks import world
from test_checkpoints import refusal

CASE = Case(
    modules={"vision": parallel(dp=2), "language": parallel(pp=2)},
    images=VARYING,
    num_microbatches=3,
    frozen=("vision.",),
    per_token=PER_TOKEN,
    assign=2,  # the first and the last microbatch
)


def trained(case: Case, folder: Path, ahead: list[int]) -> tuple[list[Any], list[int]]:
    """Losses, norms and weights after some steps, and how many microbatches were encoded by then.

    Data end with the third step. Behind the first an evaluation runs on its own, and a checkpoint
    is refused if the encoder is ahead of it.
    """
    from trainings import training

    encoded = 0

    def count(module: Any, *_: Any) -> None:
        nonlocal encoded
        encoded += module.training

    def data(*steps: int) -> Iterator[Any]:
        return chain.from_iterable(cases._data(case, step) for step in steps)

    found: list[Any] = []
    counts: list[int] = []
    with training(case) as one:
        for module in one.model.modality_submodules.values():
            for encoder in module.module.encoders.values():
                encoder.register_forward_hook(count)
        batches = data(0, 1, 2)
        save = partial(one.coordinator.save_checkpoint, folder, one.optimizer)
        for step, most in enumerate(ahead):
            run = partial(one.coordinator.forward_backward_func, encoder_ahead=most)
            with cases._replaced(cases, "forward_backward_pipelining_without_interleaving", run):
                one.coordinator.zero_grad_buffer()
                losses = one.run_on(batches)
            found += [one.optimizer.step()[1], one.coordinator.reduce_losses(losses)["loss"]]
            counts.append(encoded)
            if step == 0:
                found.append(one.evaluate(3))
                if most and case.frozen:
                    load = partial(one.coordinator.load_weights, "language", {}, strict=False)
                    for said in refusal(save, step=1), refusal(load):
                        assert f"{most} microbatches ahead" in said and "encoder_ahead=0" in said
            elif not most:
                save(step=step + 1)
        found.append(one.fingerprint())
    return found, counts


def compare(folder: Path, case: Case) -> list[list[int]]:
    """How many microbatches were encoded at the end of each step, in four trainings."""
    usual, counts = trained(case, folder / "usual", [0] * 3)
    found, counts_ahead = trained(case, folder / "ahead", [3, 0, 3])
    assert found == usual, "bit for bit"
    slices, _ = trained(evolve(case, assign=0), folder / "slices", [1, 1, 0])
    assert slices[:2] == pytest.approx(usual[:2])
    trains = trained(evolve(case, frozen=()), folder, [3])[1]
    return [counts, counts_ahead, trains]


def test_an_encoder_runs_ahead_and_every_number_stays(tmp_path):
    for counts in world(4).run(compare, tmp_path, CASE)[:2]:
        assert counts == [[3, 6, 9], [6, 6, 9], [3]]
