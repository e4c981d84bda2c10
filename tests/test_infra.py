"""Grids and process groups, on real ranks."""

from types import SimpleNamespace

import pytest
from ranks import world

from megatron_mimo_coord import (
    ModuleParallelism,
    validate_data_loader_contract,
    validate_no_stub_ranks,
)

LAYOUT = {
    "vision": ModuleParallelism(data_parallel_size=2),
    "language": ModuleParallelism(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
}


def _build() -> dict:
    import torch.distributed as dist

    from megatron_mimo_coord import MegatronMIMOInfra, is_current_rank_in_grid

    before = dist.distributed_c10d._world.pg_map.copy()
    infra = MegatronMIMOInfra.build(LAYOUT)
    grids = infra.module_to_grid_map
    here = infra.participating_modules
    groups = {
        name: {
            key: dist.get_process_group_ranks(group)
            for key, group in vars(infra.pg_collections[name]).items()
        }
        for name in here
    }
    answer = {
        "here": here,
        "in grid": [name for name, grid in grids.items() if is_current_rank_in_grid(grid)],
        "elsewhere": [name for name, groups in infra.pg_collections.items() if groups is None],
        "groups": groups,
        "enumerated": {
            "tp": grids["language"].get_rank_enum("tp"),
            "expt_dp": grids["language"].get_rank_enum("expt_dp", view="expert"),
        },
        "topology": infra.topology,
        "ndim": infra.module_output_ndim,
    }
    _meet()
    infra.destroy()
    answer["left over"] = len(dist.distributed_c10d._world.pg_map) - len(before)
    return answer


def test_build_makes_every_group_and_destroy_gives_all_back():
    ranks = world(6).run("test_infra:_build")
    for rank, answer in enumerate(ranks):
        name = "vision" if rank < 2 else "language"
        assert answer["here"] == answer["in grid"] == [name]
        assert answer["elsewhere"] == ["language" if rank < 2 else "vision"]
        assert answer["left over"] == 0
        assert all(rank in group for group in answer["groups"][name].values())
        assert answer["topology"] == {"vision": ["language"], "language": []}
        assert answer["ndim"] == {"vision": 2, "language": 3}
    last = ranks[5]["groups"]["language"]
    assert last["tp"] == [4, 5]
    assert last["pp"] == [3, 5]
    assert last["dp_cp"] == [5]
    assert last["ep"] == [4, 5]
    assert last["expt_tp"] == last["expt_dp"] == [5]
    assert last["embd"] == [3, 5]
    assert last["dp_cp_gtp_remat"] == last["dp_cp"] and last["expt_dp_gtp_remat"] == last["expt_dp"]
    assert "pos_embd" not in last
    assert ranks[2]["groups"]["language"]["pos_embd"] == [2]
    assert last["tp"] in ranks[0]["enumerated"]["tp"]
    assert "embd" not in ranks[0]["groups"]["vision"]


def _meet() -> None:
    """Have all ranks come here: one that destroys what another still connects would break that."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, device="cuda"))


def _draw() -> tuple[float, float]:
    """What this rank draws where all ranks of a stage draw alike, and where its TP ranks do not.

    From a tracker of another kind, as Transformer Engine's is.
    """
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, random

    from megatron_mimo_coord import MegatronMIMOInfra

    class OtherTracker(random.CudaRNGStatesTracker):
        pass

    infra = MegatronMIMOInfra.build(LAYOUT)
    random._CUDA_RNG_STATE_TRACKER = OtherTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    infra.initialize_megatron(seed=7)
    alike = float(torch.rand(()))
    with get_cuda_rng_tracker().fork():
        shard = float(torch.rand(()))
    assert type(get_cuda_rng_tracker()) is OtherTracker
    random.initialize_rng_tracker(force_reset=True)
    _meet()
    infra.destroy()
    return alike, shard


def test_replicas_draw_alike_and_shards_and_stages_do_not():
    alike, shards = zip(*world(6).run("test_infra:_draw"), strict=True)
    assert alike[0] == alike[1] and shards[0] == shards[1], "vision has two replicas"
    assert alike[2] == alike[3] and alike[4] == alike[5], "the stages of the language model"
    assert alike[2] != alike[4]
    assert len({*shards[2:]}) == 4, "two stages of two shards"


def _wrap() -> dict[str, str]:
    """What a rank is told that wraps modules, by what the encoders and ``configs`` are."""
    import torch
    import vlm
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from stock import Encoder, StockCase

    from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism

    case = StockCase(modules={"vision": ModuleParallelism(), "language": ModuleParallelism()})
    infra = MegatronMIMOInfra.build(case.modules)
    infra.initialize_megatron(1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True)
    said = {}
    for what in ("unknown", "none", "several", "given"):
        model = case.bare(infra)
        if "vision" in infra.participating_modules:
            encoders = model.modality_submodules["vision"].encoders
            if what == "several":
                encoders["other"] = Encoder(config, infra.pg_collections["vision"])
            else:
                encoders["encoder"] = torch.nn.Linear(3, 8)
        configs = {"given": {"vision": config}, "unknown": {"visoin": config}}.get(what)
        try:
            infra.wrap_in_ddp(model, ddp_config, configs)
            said[what] = ""
        except ValueError as error:
            said[what] = str(error)
    ddps = vlm.submodules(model)
    assert "vision" not in ddps or ddps["vision"].config is config
    assert ddp_config.bucket_size is None, "a size by one module's DP is not that of another"
    infra.wrap_in_ddp(model, ddp_config, configs)
    assert vlm.submodules(model) == ddps, "what is wrapped is not wrapped again"
    assert model.pg_collection is infra.pg_collections[infra.participating_modules[0]], (
        "a Float16Module around the model looks for it"
    )
    infra.destroy()
    return said


def test_modules_are_wrapped_once_by_a_config_of_their_own():
    for said in world(2).run("test_infra:_wrap"):
        assert "module 'vision' (VisionModalitySubmodules) holds no Megatron module" in said["none"]
        assert 'configs={"vision": config}' in said["none"]
        assert "have configs that differ in " in said["several"]
        assert "no module 'visoin': configs may name vision, language" in said["unknown"]
        assert said["given"] == ""


def _mixture_metrics() -> dict[str, float]:
    """What Megatron reports of a mixture's auxiliary loss, of which each rank has recorded some."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism

    layout = {
        "vision": ModuleParallelism(data_parallel_size=2),
        "language": ModuleParallelism(data_parallel_size=2, pipeline_model_parallel_size=2),
    }
    infra = MegatronMIMOInfra.build(layout)
    (name,) = infra.participating_modules
    groups = infra.pg_collections[name]
    tracker, total = get_moe_metrics_tracker(), {}
    loss = torch.tensor(float(2 ** dist.get_rank()), device="cuda")
    layers = groups.pp.size()
    tracker.record("load_balancing_loss", loss, groups.pp.rank() + 1, layers, needs_dp_avg=True)
    tracker.report(1.0, 0, num_layers=layers, total_loss_dict=total, pg_collection=groups)
    infra.destroy()
    return {key: float(value) for key, value in total.items()}


def test_megatrons_mixture_metrics_take_the_groups():
    """Layers of all stages, averaged over the replicas, by Megatron's own tracker."""
    ranks = world(6).run("test_infra:_mixture_metrics")
    assert ranks[:2] == [{"load_balancing_loss": (1 + 2) / 2}] * 2
    stages = (4 + 8) / 2 + (16 + 32) / 2
    assert ranks[2:] == [{"load_balancing_loss": stages / 2}] * 4, "the mean of two layers"


def _count_groups_of_a_refused_layout(layout: dict) -> int:
    import torch.distributed as dist

    from megatron_mimo_coord import MegatronMIMOInfra

    before = len(dist.distributed_c10d._world.pg_map)
    try:
        MegatronMIMOInfra.build(layout)
    except ValueError as error:
        created = len(dist.distributed_c10d._world.pg_map) - before
        raise ValueError(f"{created} groups were made; {error}") from error
    return 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"language": ModuleParallelism()}, "ranks 1-3 of 4 are in no module"),
        ({"vision": ModuleParallelism(data_parallel_size=4)}, "no module named 'language'"),
        ({"language": ModuleParallelism(data_parallel_size=8)}, "the world has 4 ranks"),
        (
            {
                "vision": ModuleParallelism(data_parallel_size=3),
                "language": ModuleParallelism(data_parallel_size=2, rank_offset=2),
            },
            "overlap in part",
        ),
    ],
)
def test_a_layout_that_cannot_run_is_refused_on_every_rank_before_any_group(layout, message):
    answers, errors = world(4).try_run("test_infra:_count_groups_of_a_refused_layout", layout)
    assert not answers
    for name, text in errors.values():
        assert name == "ValueError"
        assert "0 groups were made" in text
        assert message in text


def grid(dp: int, offset: int) -> SimpleNamespace:
    return SimpleNamespace(
        shape=[1, 1, dp, 1], dim_names=["tp", "cp", "dp", "pp"], rank_offset=offset, size=dp
    )


def test_ranks_without_work_are_named():
    grids = {"vision": grid(2, 1), "language": grid(2, 5)}
    with pytest.raises(ValueError) as error:
        validate_no_stub_ranks(grids, 10)
    for ranks in ("rank 0 of 10", "ranks 3-4 of 10", "ranks 7-9 of 10"):
        assert ranks in str(error.value)


def test_a_million_ranks_are_checked_as_intervals():
    validate_no_stub_ranks({"vision": grid(500_000, 0), "language": grid(500_000, 500_000)}, 10**6)


def test_the_data_loader_contract():
    infra = SimpleNamespace(module_to_grid_map={"vision": grid(4, 0), "language": grid(2, 4)})
    validate_data_loader_contract(infra, 32, 8, 4)
    with pytest.raises(ValueError) as error:
        validate_data_loader_contract(infra, 30, 6, 4)
    for part in (
        "global_batch_size 30 is not divisible by the DP 4 of module vision",
        "micro_batch_size 6 is not divisible by the DP 4 of module vision",
        "num_microbatches 4 x micro_batch_size 6 = 24, not the global_batch_size 30",
    ):
        assert part in str(error.value)
