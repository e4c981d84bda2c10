"""Texts that do not fit what other ranks read, or what an encoder made: told on every rank."""

from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from cases import Case
from layouts import LAYOUTS, parallel
from ranks import world
from stock import SEQUENCE_PARALLEL, StockCase
from torch.nn.functional import pad

IMAGES = {"vision": (((1, 3, 0, 1), (1, 1, 2, 0)),)}
TWO_STAGES = {"vision": parallel(), "language": parallel(pp=2)}
SHARED_FAN_OUT = LAYOUTS["colocated, fan-out"]
SHARING = {"vision": parallel(), "language": parallel(tp=2)}


def _said(case: Case, mistake: str, ranks: tuple[int, ...]) -> str:
    """What a rank is told in a training where some ranks make a mistake."""
    draw, is_one = cases.draw, dist.get_rank() in ranks

    def drawn(case: Case, step: int, microbatch: int) -> cases.Microbatch:
        found = draw(case, step, microbatch)
        if mistake in ("cut", "length"):
            end = 5 if mistake == "cut" else 10
            return evolve(found, tokens=found.tokens[:, :end], mask=found.mask[:, :end])
        if mistake == "other samples" and is_one and microbatch == 1:
            return evolve(found, tokens=found.tokens.flip(0))
        if mistake == "a token less" and is_one:
            return evolve(found, tokens=found.tokens[:, :-1], mask=found.mask[:, :-1])
        return found

    def with_other_labels(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "labels": kwargs["labels"].flip(0)}

    def built(_: object, model: torch.nn.Module) -> None:
        if mistake == "width" and len(model.modality_submodules):
            projection = model.modality_submodules["vision"].module.input_projections[0]
            projection.register_forward_hook(lambda _, __, made: pad(made, (0, 1)))
        if mistake == "other labels" and is_one:
            model.register_forward_pre_hook(with_other_labels, with_kwargs=True, prepend=True)

    slices = cases.MultiModuleCoordinator.data_parallel_slice

    def sliced(self: object, size: int, name: str | None = None) -> slice:
        return slice(0, size) if is_one and mistake == "whole" else slices(self, size, name)

    with (
        cases._replaced(cases, "draw", drawn),
        cases._replaced(cases.MultiModuleCoordinator, "data_parallel_slice", sliced),
    ):
        try:
            for _ in cases.train(case, built):
                pass
        except RuntimeError as error:
            return str(error)
    return ""


CUT = "microbatch 0: the texts of samples"
MISTAKES = {
    "cut, fan-in": (LAYOUTS["fan-in"], "cut", (), CUT),
    "cut, fan-out": (LAYOUTS["fan-out"], "cut", (), CUT),
    "cut, shared": (SHARED_FAN_OUT, "cut", (), CUT),
    "encoders shuffle": (LAYOUTS["fan-in"], "other samples", (0, 1), "ranks 0 and 2"),
    "the last stage shuffles": (TWO_STAGES, "other samples", (2,), "ranks 0 and 2"),
    "labels of others": (TWO_STAGES, "other labels", (2,), "ranks 0 and 2"),
    "a length": (SHARING, "a token less", (1, 2), "texts are 11 tokens long"),
    "whole texts": (LAYOUTS["equal"], "whole", (2, 3), "module 'language' has other samples"),
    "length": (
        {"vision": parallel(dp=2), "language": parallel(context_parallel_size=2)},
        "length",
        (),
        "microbatch 0: the texts are 10 tokens long, which 4 (2 x CP 2) does not divide: pad",
    ),
    "width": (LAYOUTS["fan-in"], "width", (), "the tokens of vision have 17 numbers, but the lang"),
    "nothing": (LAYOUTS["fan-in"], "", (), ""),
}


WITH_ANOTHER_OPTIMIZER = ("cut, fan-out", "encoders shuffle", "a length", "nothing")


@pytest.mark.parametrize(
    ("name", "is_megatrons"),
    [(name, True) for name in MISTAKES] + [(name, False) for name in WITH_ANOTHER_OPTIMIZER],
)
def test_what_does_not_fit_is_told_on_every_rank(name, is_megatrons):
    modules, mistake, ranks, message = MISTAKES[name]
    case = StockCase(
        modules=modules,
        images=IMAGES,
        configs={"language": SEQUENCE_PARALLEL} if modules is SHARING else {},
        no_optimizer=not is_megatrons,
        steps=2,
    )
    said = world(case.world_size).run("test_texts:_said", case, mistake, ranks)
    assert len(set(said)) == 1
    assert message in said[0]
    if mistake == "cut":
        assert "the text of sample 1 ends among them" in said[0]
    if mistake.startswith("other"):
        kind = "input_ids" if mistake == "other samples" else "labels"
        assert f"microbatch {int(mistake == 'other samples')}: " in said[0]
        assert f"the first that differs is sample 0 of 4 (in its {kind})" in said[0]
    if not mistake:
        assert not said[0]
