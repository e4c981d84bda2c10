"""Replicas that hold different weights are told apart, by module and parameter, on every rank."""

from contextlib import nullcontext
from typing import Any

import pytest
from attrs import frozen
from layouts import LAYOUTS, parallel
from ranks import world
from stock import StockCase, mixture

LAYOUT = {"vision": parallel(dp=2), "language": parallel(tp=2)}


def _build(case: StockCase, rank: int, weight: str) -> list[str]:
    """What is said where one element of a weight of one rank differs."""
    import torch
    import torch.distributed as dist
    import vlm

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = case.build_model(infra)
    if dist.get_rank() == rank:
        for module in vlm.submodules(model).values():
            for name, parameter in module.module.named_parameters():
                if name == weight:
                    with torch.no_grad():
                        parameter.view(-1)[-1] += 1e-6
    try:
        MultiModuleCoordinator(infra, model)
    except ValueError as error:
        return str(error).splitlines()[1:]
    finally:
        infra.destroy()
    return []


@pytest.mark.parametrize(
    ("rank", "weight", "module", "ranks"),
    [
        (1, "encoders.encoder.block.layers.1.mlp.linear_fc1.weight", "vision", "0, 1"),
        (0, "encoders.encoder.embed.bias", "vision", "0, 1"),
        (3, "decoder.layers.0.input_layernorm.weight", "language", "2, 3"),
    ],
)
def test_one_element_of_one_replica(rank, weight, module, ranks):
    said = world(4).run("test_replicas:_build", StockCase(modules=LAYOUT), rank, weight)
    assert said[0] == said[1] == said[2] == said[3]
    assert len(said[0]) == 1
    assert (
        f"replicas of module {module!r} hold different values of {weight} on ranks {ranks}, or"
        in said[0][0]
    )


def test_shards_and_experts_of_one_rank_alone_may_be_anything():
    case = StockCase(
        modules={
            "vision": parallel(dp=2, expert_model_parallel_size=2),
            "language": parallel(tp=2),
        },
        configs={"vision": mixture()},
    )
    for rank, weight in (
        (3, "decoder.layers.0.mlp.linear_fc1.weight"),
        (1, "encoders.encoder.block.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"),
    ):
        assert world(4).run("test_replicas:_build", case, rank, weight) == [[]] * 4


@frozen(kw_only=True)
class Adapted(StockCase):
    """Whose encoder gets another layer once the model is built.

    Args:
        as_the_module: whether its weights are drawn from the encoder's random states.
    """

    as_the_module: bool = True

    def wrap_modules(self, infra: Any, model: Any) -> None:
        with infra.random_states("vision") if self.as_the_module else nullcontext():
            _add_adapter(model)
        super().wrap_modules(infra, model)

    def build_whole_model(self) -> Any:
        model = super().build_whole_model()
        _add_adapter(model)
        return model


def _add_adapter(model: Any) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    encoder = model.modality_submodules["vision"].encoders["encoder"]
    size = encoder.config.hidden_size
    encoder.adapter = ColumnParallelLinear(
        size,
        size,
        config=encoder.config,
        init_method=encoder.config.init_method,
        bias=False,
        gather_output=True,
        tp_group=encoder.tp_group,
    ).cuda()
    encoder.register_forward_hook(lambda encoder, _, made: made + encoder.adapter(made)[0])


IN_PHASES = {"vision": parallel(dp=2, rank_offset=0), "language": parallel(pp=2, rank_offset=0)}


@pytest.mark.parametrize("modules", [IN_PHASES, LAYOUTS["colocated, fan-out"]])
def test_weights_that_are_added_to_a_module_later_are_drawn_as_its_own(modules):
    assert sum(world(2).run("stock:check", Adapted(modules=modules))) > 0


def test_weights_that_are_added_later_and_drawn_from_other_states():
    case = Adapted(modules=IN_PHASES, as_the_module=False)
    said, other = world(2).run("test_replicas:_build", case, -1, "")
    assert said == other
    assert "different values of encoders.encoder.adapter.weight on ranks 0, 1, or" in said[0]
    assert "with infra.random_states('vision') around what is added to it later" in said[0]


@frozen(kw_only=True)
class OneOtherwise(StockCase):
    """Whose rank 0 has a weight more, rank 1 freezes one, or rank 3 has another config."""

    otherwise: int

    def wrap_modules(self, infra: Any, model: Any) -> None:
        import torch

        if _rank() == self.otherwise == 0:
            encoder = model.modality_submodules["vision"].encoders["encoder"]
            encoder.more = torch.nn.Parameter(torch.zeros(2, device="cuda"))
        super().wrap_modules(infra, model)

    def is_frozen(self, whole_name: str) -> bool:
        return _rank() == self.otherwise == 1 and whole_name.endswith("encoder.embed.bias")

    def _config(self, name: str, *args: Any, **more: Any) -> Any:
        config = super()._config(name, *args, **more)
        if _rank() == self.otherwise == 3:
            config.layernorm_epsilon = 1e-2
        return config


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def test_what_one_rank_has_freezes_or_is_configured_alone():
    for rank, text in (
        (0, "different values of encoders.encoder.more on ranks 0, 1, or"),
        (1, "encoders.encoder.embed.bias on ranks 0, 1, or some freeze it and some do not"),
        (3, "language: layernorm_epsilon: rank 2 has 1e-05, rank 3 has 0.01"),
    ):
        case = OneOtherwise(modules=LAYOUT, otherwise=rank)
        for said in world(4).run("test_replicas:_build", case, -1, ""):
            assert len(said) == 1 and text in said[0]
