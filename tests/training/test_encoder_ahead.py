"""A frozen encoder that runs ahead of the language model changes when, and nothing else."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cases
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
    assign=2,
)


def trained(case: Case, folder: Path, ahead: int) -> tuple[list[Any], list[int]]:
    """Losses, norms and weights of four steps, and losses of evaluations in between.

    And how many microbatches were encoded at the end of each: the data end with two of them.
    """
    import torch
    from trainings import training

    encoded = 0

    def count(*_: Any) -> None:
        nonlocal encoded
        encoded += torch.is_grad_enabled()

    def data(*steps: int) -> Iterator[Any]:
        return chain.from_iterable(cases._data(case, step) for step in steps)

    found: list[Any] = []
    counts: list[int] = []
    with training(case) as one:
        for module in one.model.modality_submodules.values():
            for encoder in module.module.encoders.values():
                encoder.register_forward_hook(count)
        first, second = data(0, 1, 2), data(3)
        save = partial(one.coordinator.save_checkpoint, folder, one.optimizer)
        for step, (source, most) in enumerate(
            [(first, ahead), (first, 0), (first, ahead), (second, ahead)]
        ):
            run = partial(one.coordinator.forward_backward_func, encoder_ahead=most)
            with cases._replaced(cases, "forward_backward_pipelining_without_interleaving", run):
                one.coordinator.zero_grad_buffer()
                losses = one.run_on(source)
            found += [one.optimizer.step()[1], one.coordinator.reduce_losses(losses)["loss"]]
            counts.append(encoded)
            found.append(one.evaluate(step + 1))
            if case.frozen and most and step == 0:
                state = refusal(save, step=1)
                assert f"{ahead} microbatches ahead" in state and "encoder_ahead=0" in state, state
                load = one.coordinator.load_weights
                assert "microbatches ahead" in refusal(load, "language", {}, strict=False)
            elif step == 1:
                save(step=2)
        found.append(one.fingerprint())
    return found, counts


def compare(folder: Path, case: Case) -> list[list[int]]:
    """How many microbatches were encoded at the end of each step, in three trainings."""
    usual, counts = trained(case, folder / "0", ahead=0)
    found, counts_ahead = trained(case, folder / "2", ahead=2)
    assert found == usual, "bit for bit"
    unfrozen = evolve(case, frozen=())
    return [counts, counts_ahead, trained(unfrozen, folder / "unfrozen", ahead=2)[1]]


def test_an_encoder_runs_ahead_and_every_number_stays(tmp_path):
    usual = [3, 6, 9, 12]
    for counts in world(4).run(compare, tmp_path, CASE)[:2]:
        assert counts == [usual, [5, 6, 9, 12], usual]
