"""Samples that are packed into one row: gradients of the one loss, and whose tokens are whose."""

from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case
from context_attention import packed_positions
from layouts import FAN_OUT, LAYOUTS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world
from test_context_parallel import ThreePartCase

UNEVEN = {
    "images": {"vision": (((0, 2, 1, 3), (1, 2, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),)},
    "num_microbatches": 4,
    "assign": 2,
    "packed": True,
    "lengths": (6, 2, 1, 4),
}
"""Samples of several lengths, with images and without, of which every second microbatch's are
assigned."""
CASES = {
    "fan-in": Case(modules=LAYOUTS["fan-in"], ddp=OVERLAP, evaluate=True, **UNEVEN),
    "fan-out": Case(modules=FAN_OUT, per_token=PER_TOKEN, evaluate=True, **UNEVEN),
    "fan-out of two encoders on a rank": Case(
        modules={
            "vision": parallel(dp=2, rank_offset=0),
            "audio": parallel(tp=2, rank_offset=0),
            "language": parallel(dp=2, rank_offset=2),
        },
        **UNEVEN
        | {"images": {**UNEVEN["images"], "audio": (((1, 0, 0, 2), (0, 0, 0, 0)),)}, "assign": 0},
    ),
    "equal": Case(modules=LAYOUTS["equal"], ddp={**OVERLAP, **SHARDED}, **UNEVEN),
    "stages": Case(modules={"vision": parallel(dp=2), "language": parallel(pp=2)}, **UNEVEN),
    "shared": Case(modules=LAYOUTS["colocated"], per_token=PER_TOKEN, **UNEVEN),
    "shared, fan-out": Case(modules=LAYOUTS["colocated, fan-out"], **UNEVEN),
    "shared, stages": Case(
        modules={
            "vision": parallel(tp=2, dp=2, rank_offset=0),
            "language": parallel(pp=2, dp=2, rank_offset=0),
        },
        **UNEVEN,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_oracles(case):
    assert sum(world(case.world_size).run("cases:check", case)) > 0


CONTEXT = {
    "fan-in": Case(
        modules={"vision": parallel(dp=2), "language": parallel(context_parallel_size=2)},
        per_token=PER_TOKEN,
        **UNEVEN,
    ),
    "shared, stages, positions in three parts": ThreePartCase(
        modules={
            "vision": parallel(dp=4, rank_offset=0),
            "language": parallel(pp=2, context_parallel_size=2, rank_offset=0),
        },
        per_token={"language": True},
        **UNEVEN,
    ),
}


@pytest.mark.parametrize("case", CONTEXT.values(), ids=CONTEXT)
def test_samples_are_cut_for_context_parallel_ranks(case):
    """By a stand-in for the one function of Transformer Engine that Megatron asks for indices."""
    assert sum(world(case.world_size).run("test_packed:_check", case)) > 0


def _check(case: Case, run: Any = cases.check) -> Any:
    from megatron.core.models.mimo.partition import utils

    with (
        cases._replaced(utils, "tex", Indices),
        cases._replaced(utils, "_HAVE_TEX", True),
        cases._replaced(utils, "is_te_min_version", lambda _: True),
    ):
        return run(case)


class Indices:
    """What ``transformer_engine_torch`` says, where there is no GPU."""

    @staticmethod
    def thd_get_partitioned_indices(
        bounds: torch.Tensor, _: int, size: int, rank: int
    ) -> torch.Tensor:
        """The tokens of a packed row that a context-parallel rank reads."""
        return packed_positions(bounds.tolist(), rank, size).to(bounds.device)


class Unpadded(Case):
    """Whose samples may have any length."""

    def padded(self, length: int) -> int:
        return length


UNCUT = Case(
    modules={"vision": parallel(), "language": parallel(context_parallel_size=2)},
    images={"vision": (((0,),),)},
    packed=True,
)


def test_what_context_parallel_ranks_cannot_cut_is_told_on_every_rank():
    needs = "for which Megatron asks Transformer Engine 1.10 or newer"
    for said in world(3).run("test_packed:_uncut"):
        assert needs in said["not installed"] and "microbatch 0:" in said["not installed"]
        assert 'kv_format="thd": samples are packed' in said["said before"]
        assert needs in said["said before"]
        assert "packing_kwargs has no cu_seqlens_q_padded" in said["no bounds"]
        assert "microbatch 0: packed sample 0 of a row is 6 tokens long, which 4" in said["uneven"]
        assert "pad it to 8" in said["uneven"]


def _uncut() -> dict[str, str]:
    import vlm

    pack, config = cases._packed, vlm.MimoModelConfig

    def unbounded(*given: Any) -> dict[str, Any]:
        packed = pack(*given)
        packed["packing_kwargs"].pop("cu_seqlens_q_padded")
        return packed

    def thd(**given: Any) -> Any:
        return config(**given, kv_format="thd")

    uneven = Unpadded(modules=UNCUT.modules, images=UNCUT.images, packed=True, lengths=(6,))
    with cases._replaced(vlm, "MimoModelConfig", thd):
        said = {"said before": _error(UNCUT)}
    said["not installed"] = _error(UNCUT)
    with cases._replaced(cases, "_packed", unbounded):
        said["no bounds"] = _error(UNCUT)
    said["uneven"] = _check(uneven, _error)
    return said


def _error(case: Case) -> str:
    try:
        list(cases.train(case))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


MISTAKES = {
    "packing left out": (("packing_kwargs",), "input_ids of 1 rows"),
    "text left out": (("packing_kwargs", "input_ids"), "no input_ids"),
    "one sample": ((), "input_ids of 1 packed samples"),
}


@pytest.mark.parametrize(("left_out", "given"), MISTAKES.values(), ids=MISTAKES)
def test_fan_out_is_not_guessed(left_out, given):
    """Four tokens for each of two ranks, or six and two: nobody but the text can tell."""
    images = {"vision": (((1, 2, 0, 1),),)}
    case = Case(modules=FAN_OUT, images=images, packed=True, num_microbatches=3)
    said = world(case.world_size).run("test_packed:_said", case, left_out)
    assert len(set(said)) == 1
    assert "microbatch 0: DP rank 0 of vision made 8 tokens for 2 ranks" in said[0]
    assert f"was given {given}, which" in said[0] and "or deal the images out with" in said[0]


def _said(case: Case, left_out: tuple[str, ...]) -> str:
    """What a rank is told where the encoder's does not pass what says whose tokens are whose."""
    pack = cases._packed

    def packed(text: Any, lengths: Any) -> dict[str, Any]:
        given = pack(text, lengths)
        if dist.get_rank() > 0:
            return given
        given["packing_kwargs"]["cu_seqlens_q_padded"] = given["packing_kwargs"]["cu_seqlens_q"][
            [0, -1]
        ]
        return given | dict.fromkeys(left_out)

    with cases._replaced(cases, "_packed", packed):
        return _error(case)
