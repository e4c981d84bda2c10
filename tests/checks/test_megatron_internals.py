"""The table of Megatron's internals is complete, true, and told to the user where it is not."""

import re
from pathlib import Path
from typing import Any

import pytest
from cases import Case, built
from layouts import FAN_IN, MANY_BUCKETS, SHARDED, parallel
from ranks import world

import megatron_mimo_coord
from megatron_mimo_coord.checks.megatron_internals import INTERNALS

PACKAGE = Path(megatron_mimo_coord.__file__).parent


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda each: f"{each.owner.split('.')[-1]}")
def test_each_file_of_the_table_uses_what_it_says(internal):
    source = (PACKAGE / internal.used_by).read_text()
    unused = [name for name in internal.names if not re.search(rf"\b{name}\b", source)]
    assert not unused, f"{internal.used_by} has no {unused}: remove them from the table"


def _missing(case: Case) -> list[str]:
    infra, model, coordinator = built(case)
    ddps = [ddp for ddp, _ in coordinator.module_to_grid_tuples]
    sentences = [each.sentence(found) for each in INTERNALS if (found := each.missing(ddps))]
    model.destroy()
    infra.destroy()
    return sentences


@pytest.mark.parametrize("ddp", [{}, {**MANY_BUCKETS, **SHARDED}], ids=["whole", "sharded"])
def test_the_installed_megatron_has_everything(ddp):
    experts = {"vision": parallel(), "language": parallel(dp=2, expert_model_parallel_size=2)}
    assert world(3).run(_missing, Case(modules=experts, experts=4, ddp=ddp)) == [[]] * 3


def _without(path: str, name: str) -> Any:
    """Build a coordinator as if Megatron had lost a name."""
    from megatron_mimo_coord.checks.megatron_internals import _resolve

    owner = _resolve(path)
    kept = owner.__dict__[name]
    delattr(owner, name)
    try:
        infra, model, _ = built(Case(modules=FAN_IN))
    finally:
        setattr(owner, name, kept)
    model.destroy()
    infra.destroy()


def test_a_name_that_is_gone_is_told_on_every_rank_with_what_it_affects():
    gone = next(each for each in INTERNALS if "_empty_encoder_output" in each.names)
    answers, errors = world(3).try_run(_without, gone.owner, "_empty_encoder_output")
    assert not answers
    for kind, text in errors.values():
        assert kind == "ValueError"
        assert f"{gone.owner} has no _empty_encoder_output" in text
        assert f"megatron_mimo_coord/{gone.used_by} relies on for {gone.affects}" in text
