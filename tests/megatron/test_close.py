"""After ``close`` the model is as if no coordinator had been, and Megatron trains on with it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from cases import Case, _data, _replaced, megatrons_communicator, optimizer_of, run_schedule
from layouts import COLOCATED, FAN_IN, MANY_BUCKETS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

GATHERED = {**SHARDED, **MANY_BUCKETS, "overlap_param_gather": True, "align_param_gather": True}


def _parts(model: Any, config: Any, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Everything of others that a coordinator may change, by a path."""
    yield "config", config
    for path, module in model.named_modules():
        yield path, module
        if hasattr(module, "bucket_groups"):
            yield f"{path}: settings", module.ddp_config
            groups = module.bucket_groups + module.expert_parallel_bucket_groups
            for index, group in enumerate(groups):
                yield f"{path}: group {index}", group
                for number, bucket in enumerate(group.buckets):
                    yield f"{path}: group {index}, bucket {number}", bucket
            for index, buffer in enumerate(module.buffers + module.expert_parallel_buffers):
                yield f"{path}: buffer {index}", buffer
    yield "optimizer", optimizer
    for name, info in optimizer.module_infos.items() if optimizer else ():
        for inner in getattr(info.optimizer, "chained_optimizers", [info.optimizer]):
            if inner is not None:
                yield f"optimizer of {name}", inner
                if getattr(inner, "grad_scaler", None):
                    yield f"loss scale of {name}", inner.grad_scaler


def _attributes(*given: Any) -> dict[tuple[str, str], Any]:
    """Every attribute of these; of containers what is in them, by identity."""
    found = {}
    for path, part in _parts(*given):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, dict):
                value = tuple((key, id(each)) for key, each in value.items())
            elif isinstance(value, list | set | tuple):
                value = tuple(map(id, value))
            found[path, name] = value if isinstance(value, int | float | tuple) else id(value)
    return found


def _what_a_coordinator_leaves(case: Case, how: str) -> tuple[int, list[Any], str, list[str]]:
    """Attributes that it sets, those that differ after its end, and what it says then."""
    import weights

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(case.shape(), infra)
    with MultiModuleCoordinator(infra, model) as first:
        optimizer = optimizer_of(case, first)
    given = model, model.config, optimizer
    before = _attributes(*given)
    coordinator = MultiModuleCoordinator(infra, model)
    coordinator.attach(model.config, optimizer)
    coordinator.attach(model.config, optimizer)
    coordinator.build_pipeline_communicator(model.config)
    coordinator.record_timeline("never.json")
    for name in coordinator._job.ddps:
        if name != "language":
            coordinator.assign_images(name, [[4]] * case.micro_batch_size)
    coordinator.zero_grad_buffer()  # so that the recording has begun
    during = _attributes(*given)
    if how == "close":
        coordinator.close()
    else:
        MultiModuleCoordinator(infra, model).close()
    after = _attributes(*given)
    said = []
    for call in (
        coordinator.zero_grad_buffer,
        coordinator.finalize_model_grads,
        partial(coordinator.attach, model.config),
        partial(coordinator.save_checkpoint, "never", None, step=1),
        coordinator.evaluation,
        coordinator.no_sync,
    ):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    model.destroy()
    infra.destroy()
    changed = [key for key in before | during if before.get(key) != during.get(key)]
    left = [key for key in before | after if before.get(key) != after.get(key)]
    return len(changed), left, type(model).__name__, said


@pytest.mark.parametrize("how", ["close", "a later coordinator"])
@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN, ddp=GATHERED, per_token=PER_TOKEN),
        Case(modules=COLOCATED, ddp={"check_for_nan_in_grad": True, **OVERLAP}),
        Case(
            modules={
                "vision": parallel(),
                "language": parallel(dp=2, expert_model_parallel_size=2),
            },
            experts=4,
            frozen=("language.",),
        ),
    ],
    ids=["overlap", "colocated", "experts"],
)
def test_nothing_is_left(case, how):
    for changed, left, name, said in world(case.world_size).run(
        "test_close:_what_a_coordinator_leaves", case, how
    ):
        assert changed > 10, "there was something to undo"
        assert left == []
        by = "close()" if how == "close" else f"a later coordinator of the same {name}"
        assert len(said) == 6
        assert all(text.startswith(f"this coordinator was closed by {by}") for text in said)


def _left_by_a_failure(case: Case) -> list[Any]:
    """Attributes that differ after a coordinator that could not be built."""
    import weights

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator, coordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(case.shape(), infra)
    before = _attributes(model, model.config, None)
    with _replaced(coordinator, "schedule_pg_collection", None), pytest.raises(TypeError):
        MultiModuleCoordinator(infra, model)
    after = _attributes(model, model.config, None)
    model.destroy()
    infra.destroy()
    return [key for key in before | after if before.get(key) != after.get(key)]


def test_a_coordinator_that_cannot_be_built_leaves_nothing():
    assert (
        world(3).run("test_close:_left_by_a_failure", Case(modules=FAN_IN, ddp=GATHERED))
        == [[]] * 3
    )


def _trained(case: Case, with_coordinator: bool) -> list[float]:
    """Losses of Megatron's schedule, finalize and optimizer alone, some behind a coordinator's."""
    import weights
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(case.shape(), infra)
    sharded = bool(case.ddp.get("use_distributed_optimizer"))
    settings = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=sharded)
    optimizer = get_mimo_optimizer(model, settings)
    coordinator = MultiModuleCoordinator(infra, model)
    if with_coordinator:
        coordinator.attach(model.config, optimizer)
        communicator = coordinator.build_pipeline_communicator(model.config)
        coordinator.zero_grad_buffer()
        run_schedule(case, model, coordinator, communicator, _data(case, 0))
    coordinator.close()
    communicator = megatrons_communicator(infra, model.config)
    (name,) = infra.participating_modules
    ddp = model.language_model if name == "language" else model.modality_submodules[name]
    groups = infra.pg_collections[name]

    def finalize(*_: Any, **__: Any) -> None:
        finalize_model_grads([ddp], None, pg_collection=groups)

    model.config.no_sync_func, model.config.finalize_model_grads_func = ddp.no_sync, finalize
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        ddp.zero_grad_buffer()
        reported = run_schedule(case, model, coordinator, communicator, _data(case, step))
        losses += [float(sum_and_number["loss"][0]) for sum_and_number in reported]
        assert optimizer.step()[0]
    model.destroy()
    infra.destroy()
    return losses


@pytest.mark.parametrize("ddp", [{}, {**SHARDED, **MANY_BUCKETS}], ids=["whole", "sharded"])
def test_megatron_trains_on_with_equal_numbers(ddp):
    case = Case(modules={"vision": parallel(dp=2), "language": parallel(dp=2)}, ddp=ddp)
    ours = world(4).run("test_close:_trained", case, True)
    assert ours == world(4).run("test_close:_trained", case, False)
    assert len(ours[-1]) == 3 * case.num_microbatches and len(set(ours[-1])) > 3


def _saved_behind_its_end(folder: str) -> list[tuple[str, int]]:
    """A checkpoint whose coordinator ends while it is written, and what a later one loads."""
    from cases import built

    from megatron_mimo_coord import MultiModuleCoordinator

    infra, model, coordinator = built(Case(modules=COLOCATED))
    saved = coordinator.save_checkpoint(folder, None, step=7, background=True)
    later = MultiModuleCoordinator(infra, model)
    path = saved.wait()
    step, _ = later.load_checkpoint(folder, None)
    model.destroy()
    infra.destroy()
    return path.name, step


def test_a_checkpoint_in_the_background_outlives_its_coordinator(tmp_path):
    answers = world(2).run("test_close:_saved_behind_its_end", str(tmp_path))
    assert answers == [("step-00000007", 7)] * 2
