"""Context parallelism of the language model: gradients of the one loss, lengths, and the settings."""

import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import vlm
from attrs import evolve
from cases import Case
from layouts import OVERLAP, PER_TOKEN, SHARDED, VARYING, parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel
from ranks import world

from megatron_mimo_coord import MegatronMIMOInfra

CP2 = {"context_parallel_size": 2}
CASES = {
    "alone": Case(modules={"vision": parallel(), "language": parallel(**CP2)}),
    "fan-in": Case(
        modules={"vision": parallel(dp=2), "language": parallel(**CP2)},
        images=VARYING,
        per_token=PER_TOKEN,
        ddp={**OVERLAP, **SHARDED},
    ),
    "fan-out": Case(
        modules={"vision": parallel(), "language": parallel(dp=2, **CP2)}, images=VARYING
    ),
    "assigned": Case(
        modules={"vision": parallel(dp=2), "language": parallel(dp=2, **CP2)},
        images=VARYING,
        assign=1,
        per_token={"language": True},
    ),
    "stages": Case(
        modules={"vision": parallel(dp=2), "language": parallel(pp=2, **CP2)},
        images=VARYING,
        num_microbatches=3,
        tied_embeddings=True,
    ),
    "tensor parallel": Case(
        modules={"vision": parallel(tp=2), "language": parallel(tp=2, **CP2)},
        images=VARYING,
        evaluate=True,
    ),
    "mixture": Case(
        modules={
            "vision": parallel(),
            "language": parallel(
                tp=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1, **CP2
            ),
        },
        images=VARYING,
        experts=4,
    ),
    "shared": Case(
        modules={
            "vision": parallel(dp=2, rank_offset=0),
            "language": parallel(**CP2, rank_offset=0),
        },
        images=VARYING,
        evaluate=True,
        ddp={**OVERLAP, **SHARDED},
    ),
    "shared, fan-out": Case(
        modules={
            "vision": parallel(tp=2, rank_offset=0),
            "language": parallel(dp=2, **CP2, rank_offset=0),
        },
        images=VARYING,
        per_token=PER_TOKEN,
    ),
    "shared, stages": Case(
        modules={
            "vision": parallel(dp=4, rank_offset=0),
            "language": parallel(pp=2, expert_model_parallel_size=2, **CP2, rank_offset=0),
        },
        images=VARYING,
        assign=1,
        num_microbatches=3,
        experts=4,
    ),
    "four": Case(
        modules={"vision": parallel(dp=2), "language": parallel(context_parallel_size=4)},
        images=VARYING,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_oracles(case):
    assert sum(world(case.world_size).run("cases:check", case)) > 0


class RotaryGPT(GPTModel):
    """With rotary positions, of one number or of three."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        kind = "mrope" if config.mrope_section else "rope"
        super().__init__(config=config, position_embedding_type=kind, **arguments)


YARN = {
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "correction_range_round_to_int": True,
}


class YarnGPT(GPTModel):
    """With rotary positions that are stretched, longer than those that the model knew."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        for name, value in YARN.items():
            setattr(config, f"yarn_{name}", value)
        super().__init__(config=config, position_embedding_type="yarn", **arguments)


class RotaryCase(Case):
    """Whose language model has rotary positions, which Megatron cuts like the sequence."""

    kind = RotaryGPT

    def build_model(self, infra: MegatronMIMOInfra) -> MimoModel:
        with cases._replaced(vlm, "GPTModel", self.kind):
            return super().build_model(infra)

    def build_whole_model(self) -> MimoModel:
        with cases._replaced(vlm, "GPTModel", self.kind):
            return super().build_whole_model()


class YarnCase(RotaryCase):
    """Whose positions are YaRN's."""

    kind = YarnGPT


class ThreePartCase(RotaryCase):
    """Whose positions have three parts, as Qwen-VL's: time, height and width."""

    def shape(self) -> Any:
        shape = super().shape()
        return evolve(shape, config={**shape.config, "mrope_section": [2, 1, 1]})

    def positions_of(self, tokens: torch.Tensor) -> torch.Tensor:
        time = super().positions_of(tokens)
        return torch.stack((time, tokens % 5, time // 2 + tokens % 3))


ROTARY = {
    "one number": RotaryCase(
        modules={"vision": parallel(dp=2), "language": parallel(**CP2)}, images=VARYING
    ),
    "stretched": YarnCase(
        modules={"vision": parallel(dp=2), "language": parallel(**CP2)}, images=VARYING
    ),
    "three": ThreePartCase(
        modules={"vision": parallel(), "language": parallel(dp=2)}, images=VARYING
    ),
    "three, context parallel": ThreePartCase(
        modules={"vision": parallel(dp=2), "language": parallel(**CP2)},
        images=VARYING,
        assign=1,
    ),
    "three, shared, stages": ThreePartCase(
        modules={
            "vision": parallel(tp=2, dp=2, rank_offset=0),
            "language": parallel(pp=2, **CP2, rank_offset=0),
        },
        images=VARYING,
        num_microbatches=3,
    ),
    "three, packed": ThreePartCase(
        modules={"vision": parallel(dp=2), "language": parallel(pp=2)},
        images=VARYING,
        packed=True,
        lengths=(6, 2, 1, 4),
    ),
}


@pytest.mark.parametrize("case", ROTARY.values(), ids=ROTARY)
def test_rotary_positions_are_those_of_the_whole_sequence(case):
    case = evolve(case, rehearse=False)
    assert sum(world(case.world_size).run("cases:check", case)) > 0


@pytest.mark.parametrize("case", [CASES["assigned"], CASES["shared"]], ids=["assigned", "shared"])
def test_a_gradient_of_some_positions_is_noticed(case):
    """Each rank returns the gradient of its own positions alone: the check must find it."""
    case = evolve(case, no_optimizer=True)
    assert any(world(case.world_size).run("test_context_parallel:_is_caught", case))


def _is_caught(case: Case) -> bool:
    import cases

    from megatron_mimo_coord.bridges.incoming import TargetEnd

    returns = TargetEnd.returns

    def alone(end: TargetEnd, *given: Any) -> Any:
        end.sequence_peers = None
        return returns(end, *given)

    with cases._replaced(TargetEnd, "returns", alone):
        try:
            cases.check(evolve(case, rehearse=False))
        except AssertionError:
            return True
    return False


def test_losses_of_other_tokens_than_a_ranks_own_are_told():
    """By the whole mask, or as a mean of its own positions that Megatron multiplies by CP."""
    modules = {"vision": parallel(), "language": parallel(pp=2, **CP2)}
    case = Case(modules=modules, images=VARYING, num_microbatches=3, loss_scale=4.0)
    for said in world(5).run("test_context_parallel:_told", case):
        assert "losses, loss_mask = model(...)" in said["whole mask, per token"]
        assert said["whole mask, mean"] == said["whole mask, per token"]
        assert "multiplies such a loss by the CP" in said["pair of one's own"]
        assert said["pair of all"] == said["pair, one rank has all"] == ""


def _told(case: Case) -> dict[str, str]:
    """What a rank is told of loss functions."""
    given: list[torch.Tensor] = []

    def watch(_: Any, model: MimoModel) -> None:
        model.register_forward_pre_hook(
            lambda _, __, kwargs: given.append(kwargs["loss_mask"]), with_kwargs=True
        )

    def whole(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        return (losses * mask).sum(), given[-1].sum().int(), {}

    def pair(of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
            return (losses * mask).sum() / of(mask).sum().clamp(min=1), {}

        return loss

    def of_all(mask: torch.Tensor) -> torch.Tensor:
        return given[-1]

    one_rank = evolve(case, lengths=(1,), images={})
    losses = {
        "whole mask, per token": (evolve(case, per_token=PER_TOKEN), whole),
        "whole mask, mean": (case, whole),
        "pair of one's own": (case, pair(lambda mask: mask)),
        "pair of all": (case, pair(of_all)),
        "pair, one rank has all": (one_rank, pair(of_all)),
    }
    said = dict.fromkeys(losses, "")
    for name, (run, loss) in losses.items():
        with cases._replaced(cases, "_loss", loss):
            try:
                list(cases.train(run, built=watch))
            except RuntimeError as error:
                said[name] = str(error)
    return said


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_attention_of_these_tests_is_plain_attention(size):
    """Of two samples, and of samples of 4 and 12 tokens that are packed into one row."""
    world(size).run("test_context_parallel:_compare_attention")


def _compare_attention() -> None:
    import torch.distributed as dist
    from context_attention import ContextAttention, packed_positions, positions
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=3)
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((3, 16, 2, 3, 4), generator=generator).cuda().requires_grad_()
    heads_first = whole.permute(0, 2, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    plain = plain.permute(2, 0, 1, 3).flatten(2)
    weigh = torch.randn(plain.shape, generator=generator).cuda()
    (expected,) = torch.autograd.grad((plain * weigh).sum(), whole)

    here = positions(16, rank, size)
    mine = whole.detach()[:, here].requires_grad_()
    attention = ContextAttention(config, pg_collection=ProcessGroupCollection(cp=dist.group.WORLD))
    found = attention(*mine)
    torch.testing.assert_close(found, plain[here])
    (gradient,) = torch.autograd.grad((found * weigh[here]).sum(), mine)
    torch.testing.assert_close(gradient, expected[:, here])

    bounds = [0, 4, 16] if size < 4 else [0, 8, 16]  # of which 2 x CP divides each
    samples = [heads_first[:, :1, :, a:b] for a, b in itertools.pairwise(bounds)]
    apart = [torch.nn.functional.scaled_dot_product_attention(*s, is_causal=True) for s in samples]
    plain = torch.cat(apart, 2).permute(2, 0, 1, 3).flatten(1)
    here = packed_positions(bounds, rank, size)
    packing = PackedSeqParams(cu_seqlens_q=torch.tensor(bounds).cuda())
    found = attention(*whole[:, here, 0], packed_seq_params=packing)
    torch.testing.assert_close(found.flatten(1), plain[here])


class Odd(Case):
    """Of a length that does not divide."""

    @property
    def sequence(self) -> int:
        return 18


class Untold(Case):
    """Whose configs know nothing of context parallelism."""

    def build_model(self, infra: MegatronMIMOInfra) -> MimoModel:
        model = super().build_model(infra)
        if model.language_model is not None:
            model.language_model.config.context_parallel_size = 1
        return model


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        (Odd, "RuntimeError", "are 18 tokens long, which 4 (2 x CP 2) does not divide: pad"),
        (Untold, "ValueError", "has CP 2 in its grid, but its config says context_parallel_size=1"),
    ],
)
def test_what_does_not_fit_is_told_on_every_rank(kind, error, told):
    case = kind(modules={"vision": parallel(dp=2), "language": parallel(**CP2)})
    answers, errors = world(case.world_size).try_run("test_context_parallel:_train", case)
    assert not answers and len(errors) == 4
    for name, text in errors.values():
        assert name == error and told in text


def _train(case: Case) -> None:
    import cases

    list(cases.train(case))
