"""What a coordinator finds worth saying about a module."""

from typing import Any

import pytest
from cases import Case
from layouts import FAN_IN, PER_TOKEN
from ranks import world


def _said(case: Case, coefficient: Any) -> list[str]:
    """Warnings at construction where vision is a mixture of experts."""
    import logging

    import vlm
    import weights

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(case.shape(), infra)
    for ddp in vlm.submodules(model).values():
        ddp.config.num_moe_experts, ddp.config.moe_aux_loss_coeff = 4, coefficient
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mimo_coord").addHandler(handler)
    try:
        MultiModuleCoordinator(infra, model)
    finally:
        logging.getLogger("megatron_mimo_coord").removeHandler(handler)
        infra.destroy()
    return said


@pytest.mark.parametrize(
    ("per_token", "coefficient", "divisor"),
    [
        ({}, 0.01, "the language model's DP 1"),
        (PER_TOKEN, [0.0, 0.01], "the tokens of the step"),
        ({}, 0.0, ""),
    ],
    ids=["mean", "per token", "none"],
)
def test_an_encoders_auxiliary_loss_is_said_to_follow_the_layout(per_token, coefficient, divisor):
    case = Case(modules=FAN_IN, per_token=per_token)
    first, *others = world(3).run("test_modules:_said", case, coefficient)
    assert others == [[], []], "once a module, and never of the language model"
    assert len(first) == bool(divisor)
    if divisor:
        assert f"a sum over its 2 replicas, divided by {divisor}" in first[0]
