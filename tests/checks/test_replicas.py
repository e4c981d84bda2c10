"""Replicas that hold different weights are told apart, by module and parameter, on every rank."""

import pytest
from layouts import parallel
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
        f"replicas of module {module!r} hold different values of {weight}, and would" in said[0][0]
    )
    assert f"(says ranks {ranks})" in said[0][0]


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
