"""What a trainer can see of a step: norms, timers, named ranges, logs."""

from math import inf
from typing import Any

import pytest
from cases import Case, built
from layouts import COLOCATED, FAN_IN, LAYOUTS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

TWO_ENCODERS = {
    "vision": parallel(rank_offset=0),
    "audio": parallel(rank_offset=0),
    "language": parallel(pp=2),
}


# -- norms and counts ------------------------------------------------------------------------------


def _norms(case: Case, after: str) -> dict[str, Any]:
    """What the coordinator says, beside the same from the whole model's gradients put together."""
    import torch
    import torch.distributed as dist
    import vlm
    import weights

    from megatron_mimo_coord import MultiModuleCoordinator

    infra, model, coordinator = built(case)
    config = model.config
    scale = 4.0 if after else 1.0

    class Optimizer:
        def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
            return loss * scale

    coordinator.attach(config, Optimizer() if after != "a trainer's own" else None)
    if after == "a trainer's own":
        config.grad_scale_func = Optimizer().scale_loss
    coordinator.zero_grad_buffer()
    whole: dict[str, tuple[int, float]] = {}
    for name, ddp in vlm.submodules(model).items():
        for key, param, shard in weights.named_shards(name, ddp.module, infra.pg_collections[name]):
            if param.requires_grad:
                shape = list(param.shape)
                shape[shard.dim] *= shard.count
                number = sum(map(ord, key))
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
                param.main_grad.copy_(shard.of(grad))
                times = 1.0
                if case.tied_embeddings and "word_embeddings" in key:
                    times = 2.0  # the first and the last stage add up what they have
                if ".experts." in key:  # these have fewer replicas to add up
                    times /= case.modules[name].expert_model_parallel_size
                whole[key] = (grad.numel(), float((times * grad).double().square().sum()))
    coordinator.finalize_model_grads(
        [model], torch.ones((), dtype=torch.int, device="cuda") if case.per_token else None
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, whole)
    everything = {key: value for part in gathered for key, value in part.items()}
    expected = {}
    for name, grid in coordinator._grids.items():
        of_module = [value for key, value in everything.items() if key.startswith(f"{name}.")]
        # Replicas hold the same gradient: their sum is R times as large. The loss is a mean over
        # R_language replicas, or over as many tokens.
        factor = grid.replicas / coordinator._grids["language"].replicas / scale
        expected[name] = (
            sum(count for count, _ in of_module),
            sum(square for _, square in of_module) ** 0.5 * factor,
        )
    asked = coordinator
    if after == "another coordinator's":
        asked = MultiModuleCoordinator(infra, model)
        asked.attach(config, Optimizer())
    syncs = []
    item = torch.Tensor.item
    torch.Tensor.item = lambda tensor: syncs.append(1) or item(tensor)
    try:
        norms = asked.grad_norms()
        assert not syncs
    finally:
        torch.Tensor.item = item
    answer = {
        "norms": {name: float(norm) for name, norm in norms.items()},
        "counts": asked.num_trainable_parameters(),
        "expected": expected,
    }
    model.destroy()
    infra.destroy()
    return answer


@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN),
        Case(modules=FAN_IN, ddp=SHARDED),
        Case(modules=FAN_IN, ddp={**SHARDED, **OVERLAP}, per_token=PER_TOKEN),
        Case(modules=COLOCATED),
        Case(modules=LAYOUTS["fan-out"], frozen=("vision.encoders",)),
        Case(modules={"vision": parallel(), "language": parallel(tp=2)}),
        Case(modules={"vision": parallel(pp=2), "language": parallel(pp=2)}, tied_embeddings=True),
        Case(
            modules={
                "vision": parallel(dp=2),
                "language": parallel(dp=2, expert_model_parallel_size=2),
            },
            experts=2,
        ),
    ],
)
def test_norms_are_those_of_the_whole_model(case):
    for answer in world(case.world_size).run("test_observation:_norms", case, ""):
        for name, (count, norm) in answer["expected"].items():
            assert answer["norms"][name] == pytest.approx(norm, rel=1e-5), name
            assert answer["counts"][name] == count


@pytest.mark.parametrize("whose", ["a loss scale", "a trainer's own", "another coordinator's"])
def test_norms_leave_the_loss_scale_out(whose):
    for answer in world(3).run("test_observation:_norms", Case(modules=FAN_IN), whose):
        for name, (_, norm) in answer["expected"].items():
            assert answer["norms"][name] == pytest.approx(norm, rel=1e-5)


# -- gradients that are not finite -----------------------------------------------------------------


def _not_finite(
    case: Case, module: str, value: float, here: int, where: str, limit: float = inf
) -> dict[str, Any]:
    """A sound step, one with a bad number in one gradient on one rank, and a sound one again."""
    import logging

    import torch
    import torch.distributed as dist
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    infra, model, coordinator = built(case)
    optimizer = get_mimo_optimizer(
        model,
        OptimizerConfig(
            optimizer="adam",
            lr=0.1,
            clip_grad=1.0,
            grad_norm_skip_threshold=limit,
            use_distributed_optimizer=bool(case.ddp.get("use_distributed_optimizer")),
        ),
    )
    coordinator.attach(model.config, optimizer)
    coordinator.attach(model.config, optimizer)  # guards it once
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mimo_coord").addHandler(handler)

    def step(bad: bool) -> tuple[tuple, bool]:
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.zero_grad()
        coordinator.zero_grad_buffer()
        with coordinator.no_sync():
            pass
        for ddp, _ in coordinator.module_to_grid_tuples:
            for buffer in ddp.buffers:
                buffer.grad_data.normal_()
        if bad and dist.get_rank() == here:
            ddp = next(m.ddp.ddp for m in coordinator._modules.values() if m.name == module)
            parameters = dict(ddp.module.named_parameters())
            name = next(name for name in parameters if where in name)
            parameters[name].main_grad.view(-1)[0] = value
        coordinator.finalize_model_grads([model])
        outcome = optimizer.step()
        for ddp, _ in coordinator.module_to_grid_tuples:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)
        after = list(model.parameters())
        return outcome, all(torch.equal(*pair) for pair in zip(before, after, strict=True))

    try:
        outcomes = [step(False), step(True), step(False)]
        coordinator.zero_grad_buffer()
        for ddp, _ in coordinator.module_to_grid_tuples:
            for buffer in ddp.buffers:
                buffer.grad_data.fill_(1.0)
        alone = optimizer.get_grad_norm()
    finally:
        logging.getLogger("megatron_mimo_coord").removeHandler(handler)
        model.destroy()
        infra.destroy()
    return {"outcomes": outcomes, "said": said, "norm": alone}


@pytest.mark.parametrize(
    ("case", "module", "value", "here", "where"),
    [
        (Case(modules=FAN_IN), "vision", float("nan"), 0, ""),
        (Case(modules=FAN_IN), "language", float("inf"), 2, ""),
        (Case(modules=FAN_IN, ddp=SHARDED), "vision", float("-inf"), 1, ""),
        (Case(modules=FAN_IN, ddp={**SHARDED, **OVERLAP, "overlap_param_gather": True}), "vision", float("nan"), 1, ""),
        (Case(modules=COLOCATED), "vision", float("nan"), 1, ""),
        (Case(modules=FAN_IN, ddp={"check_for_nan_in_grad": True}), "vision", float("nan"), 1, ""),
        (Case(modules=FAN_IN, ddp={"check_for_nan_in_grad": True, **OVERLAP}), "language", float("inf"), 2, ""),
        (Case(modules={"vision": parallel(), "language": parallel(tp=2)}), "language", float("nan"), 2, ""),
        (Case(modules={"vision": parallel(), "language": parallel(pp=2)}), "language", float("nan"), 1, ""),
        (Case(modules={"vision": parallel(), "language": parallel(tp=2)}), "language", float("nan"), 2, "layernorm"),
        (Case(modules={"vision": parallel(), "language": parallel(tp=2)}, ddp=SHARDED), "language", float("inf"), 2, "layernorm"),
        (Case(modules={"vision": parallel(), "language": parallel(pp=2)}, tied_embeddings=True), "language", float("nan"), 2, "output_layer"),
        (Case(modules={"vision": parallel(dp=2), "language": parallel(dp=2, expert_model_parallel_size=2)}, experts=2), "language", float("nan"), 3, "experts"),
        (Case(modules=FAN_IN, frozen=("vision",)), "language", float("nan"), 2, ""),
    ],
)  # fmt: skip
def test_a_bad_number_skips_the_step_on_all_ranks_and_names_the_module(
    case, module, value, here, where
):
    arguments = case, module, value, here, where
    answers = world(case.world_size).run("test_observation:_not_finite", *arguments)
    for rank, answer in enumerate(answers):
        (fine, still), (bad, kept), (again, stuck) = answer["outcomes"]
        learns = not (case.frozen and rank < 2)
        assert fine[0] and again[0] and still == stuck == (not learns)
        assert bad == (False, None, None) and kept
        assert fine[1] == answers[0]["outcomes"][0][0][1], "all ranks clip by the same norm"
        assert answer["norm"] == answers[0]["norm"]
        assert len(answer["said"]) == (rank == 0)
    assert f"skipped on all ranks: the gradients of module {module!r} are" in answers[0]["said"][0]


@pytest.mark.parametrize(
    ("case", "module", "here", "where"),
    [
        (Case(modules=FAN_IN), "vision", 0, ""),
        (
            Case(modules={"vision": parallel(), "language": parallel(tp=2)}),
            "language",
            2,
            "layernorm",  # a copy, which the norm leaves out
        ),
    ],
    ids=["counted", "beside the norm"],
)
def test_gradients_whose_squares_overflow_are_finite(case, module, here, where):
    arguments = case, module, 1e30, here, where
    answers = world(case.world_size).run("test_observation:_not_finite", *arguments)
    for answer in answers:
        (done, norm, _), kept = answer["outcomes"][1]
        assert done and not kept and not answer["said"]
        assert norm == answers[0]["outcomes"][1][0][1]
        assert norm < 1e31 and (where or norm > 1e29)


def test_a_norm_above_megatrons_threshold_skips_the_step_on_all_ranks():
    case = Case(modules={"vision": parallel(), "language": parallel()})
    arguments = case, "vision", 1e6, 0, "", 1e5
    answers = world(2).run("test_observation:_not_finite", *arguments)
    for answer in answers:
        (fine, still), (large, kept), (again, stuck) = answer["outcomes"]
        assert fine[0] and again[0] and not still and not stuck
        assert large == (False, None, None) and kept
    [said] = answers[0]["said"]
    assert "skipped on all ranks: the norm of the gradients is 1e+06, above" in said


def _loss_scales(guarded: bool) -> list[float]:
    """The scale of this rank's module after each of four steps; vision overflows in the second."""
    import torch
    import weights
    from attrs import evolve
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    half = {"fp16": True, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}
    infra = MegatronMIMOInfra.build(FAN_IN)
    model = weights.build_model(
        evolve(Case(modules=FAN_IN).shape(), config=half),
        infra,
        prepare=lambda model: model.half(),
    )
    coordinator = MultiModuleCoordinator(infra, model)
    optimizer = get_mimo_optimizer(
        model, OptimizerConfig(optimizer="adam", lr=0.1, fp16=True, hysteresis=1)
    )
    if guarded:
        coordinator.attach(model.config, optimizer)
    scales = []
    for step in range(4):
        coordinator.zero_grad_buffer()
        for ddp, _ in coordinator.module_to_grid_tuples:
            for buffer in ddp.buffers:
                bad = step == 1 and infra.participating_modules == ["vision"]
                buffer.grad_data.fill_(float("inf") if bad else 1.0)
        coordinator.finalize_model_grads([model])
        assert optimizer.step()[0] == (step != 1)
        scales.append(float(optimizer.get_loss_scale()))
    model.destroy()
    infra.destroy()
    return scales


def test_loss_scales_of_all_modules_change_together():
    first = 2.0**32
    for scales in world(3).run("test_observation:_loss_scales", True):
        assert scales == [first, first / 2, first / 2, first / 2]
    drifted = world(3).run("test_observation:_loss_scales", False)
    assert drifted[0] != drifted[2], "Megatron itself has mended it: optimizer_steps.py need not"


# -- timers, ranges, logs --------------------------------------------------------------------------


def _timers(case: Case, barrier: bool) -> dict[str, Any]:
    from megatron.core.timers import Timers

    infra, model, coordinator = built(case)
    config = model.config
    coordinator.attach(config)
    config.timers, config.barrier_with_L1_time = Timers(2, "minmax"), barrier
    before = [
        (ddp.config.timers, ddp.config.barrier_with_L1_time)
        for ddp, _ in coordinator.module_to_grid_tuples
    ]
    coordinator.zero_grad_buffer()
    coordinator.finalize_model_grads([model])
    after = [
        (ddp.config.timers, ddp.config.barrier_with_L1_time)
        for ddp, _ in coordinator.module_to_grid_tuples
    ]
    answer = {
        "restored": before == after,
        "timed": {name: timer.active_time() for name, timer in config.timers._timers.items()},
    }
    infra.destroy()
    return answer


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize("modules", [FAN_IN, COLOCATED, TWO_ENCODERS])
def test_timers_of_the_config_are_those_of_megatron(modules, barrier):
    case = Case(modules=modules)
    for answer in world(case.world_size).run("test_observation:_timers", case, barrier):
        assert answer["restored"]
        assert {"all-grads-sync", "embedding-grads-all-reduce"} <= set(answer["timed"])
        assert all(seconds > 0 for seconds in answer["timed"].values())


def _ranges() -> dict[str, list[str]]:
    import torch

    infra, model, coordinator = built(Case(modules=COLOCATED))
    pushed: list[str] = []
    push = torch.cuda.nvtx.range_push
    torch.cuda.nvtx.range_push = lambda name: pushed.append(name) or push(name)
    coordinator.zero_grad_buffer()
    try:
        with torch.profiler.profile() as profile:
            coordinator.finalize_model_grads([model])
    finally:
        torch.cuda.nvtx.range_push = push
    names = ("finalize_model_grads", "vision", "language")
    infra.destroy()
    return {
        "nvtx": [name for name in pushed if name in names],
        "profiler": sorted(event.name for event in profile.events() if event.name in names),
        "built for CUDA": bool(torch.version.cuda),
    }


def test_finalizing_a_module_shows_under_its_name():
    for answer in world(2).run("test_observation:_ranges"):
        assert answer["profiler"] == ["finalize_model_grads", "language", "vision"]
        if answer["built for CUDA"]:
            assert answer["nvtx"] == ["finalize_model_grads", "vision", "language"]


def _log() -> list[tuple[str, str]]:
    import logging

    said: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.name, record.getMessage()))
    logger = logging.getLogger("megatron_mimo_coord")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        infra, _, _ = built(Case(modules=FAN_IN))
        infra.destroy()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return said


def test_the_layout_is_logged_once_a_job():
    first, *others = world(3).run("test_observation:_log")
    assert others == [[], []]
    ((name, text),) = first
    assert name == "megatron_mimo_coord.coordinator"
    assert "fan-in 2:1" in text
