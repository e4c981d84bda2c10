"""Context parallelism of the language model: gradients of the one loss, lengths, and the settings."""

from typing import Any

import cases
import pytest
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
            "language": parallel(pp=2, **CP2, rank_offset=0),
        },
        images=VARYING,
        assign=1,
        num_microbatches=3,
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
    """With rotary positions."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(position_embedding_type="rope", **arguments)


class RotaryCase(Case):
    """Whose language model has rotary positions, which Megatron cuts like the sequence."""

    def build_model(self, infra: MegatronMIMOInfra) -> MimoModel:
        with cases._replaced(vlm, "GPTModel", RotaryGPT):
            return super().build_model(infra)

    def build_whole_model(self) -> MimoModel:
        with cases._replaced(vlm, "GPTModel", RotaryGPT):
            return super().build_whole_model()


def test_rotary_positions_are_those_of_the_whole_sequence():
    modules = {"vision": parallel(dp=2), "language": parallel(**CP2)}
    case = RotaryCase(modules=modules, images=VARYING)
    assert sum(world(4).run("cases:check", case)) > 0


@pytest.mark.parametrize("case", [CASES["assigned"], CASES["shared"]], ids=["assigned", "shared"])
def test_a_gradient_of_some_positions_is_noticed(case):
    """Each rank returns the gradient of its own positions alone: the check must find it."""
    case = evolve(case, no_optimizer=True)
    assert any(world(case.world_size).run("test_context_parallel:_is_caught", case))


def _is_caught(case: Case) -> bool:
    import cases

    from megatron_mimo_coord.bridges.incoming import Incoming

    made = Incoming.__attrs_post_init__

    def alone(link: Incoming) -> None:
        made(link)
        link.sequence_peers = None

    with cases._replaced(Incoming, "__attrs_post_init__", alone):
        try:
            cases.check(case)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_attention_of_these_tests_is_plain_attention(size):
    world(size).run("test_context_parallel:_compare_attention")


def _compare_attention() -> None:
    import torch
    import torch.distributed as dist
    from context_attention import ContextAttention, positions
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=3)
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((3, 16, 2, 3, 4), generator=generator).cuda().requires_grad_()
    heads_first = [each.permute(1, 2, 0, 3) for each in whole]
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
    ("kind", "told"),
    [
        (Odd, "max_sequence_length is 18, which 4 (2 x CP 2) does not divide: make it 20"),
        (Untold, "has CP 2 in its grid, but its config says context_parallel_size=1"),
    ],
)
def test_what_does_not_fit_is_told_on_every_rank(kind, told):
    case = kind(modules={"vision": parallel(dp=2), "language": parallel(**CP2)})
    answers, errors = world(case.world_size).try_run("test_context_parallel:_train", case)
    assert not answers and len(errors) == 4
    for name, text in errors.values():
        assert name == "ValueError" and told in text


def _train(case: Case) -> None:
    import cases

    list(cases.train(case))
