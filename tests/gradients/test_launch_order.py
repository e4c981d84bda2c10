"""One order of collectives on all ranks, and as much overlap as Megatron's DDP has by itself."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import pytest
from attrs import evolve
from cases import Case, built
from layouts import FAN_IN, LAYOUTS, MANY_BUCKETS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world


@contextmanager
def replaced(owner: Any, **replacements: Callable[..., Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(owner, name, replacement)
        yield
    finally:
        for name, original in before.items():
            setattr(owner, name, original)


# -- overlap ---------------------------------------------------------------------------------------


@contextmanager
def _traced(steps: list[list[int]]) -> Iterator[None]:
    """Records in the last step, for each launch, how many gradients were ready before it."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    register, start = Group.register_grad_ready, Group.start_grad_sync
    ready = [0]

    def counted_register(group: Any, *args: Any, **kwargs: Any) -> None:
        ready[0] += group.is_last_microbatch
        register(group, *args, **kwargs)

    def counted_start(group: Any, *args: Any, **kwargs: Any) -> None:
        if not (group.is_first_batch and group.grad_reduce_handle is not None):
            steps[-1].append(ready[0])
        start(group, *args, **kwargs)

    with replaced(Group, register_grad_ready=counted_register, start_grad_sync=counted_start):
        yield


def _early(steps: list[list[int]]) -> list[tuple[int, int]]:
    """For each step (launches before the step's last gradient, launches)."""
    ends = [max(step, default=0) for step in steps]
    return [
        (sum(number < end for number in step), len(step))
        for step, end in zip(steps, ends, strict=True)
    ]


def _two_dtypes(case: Case) -> Any:
    """The case's model in bf16 with norms in fp32, which have a buffer of their own."""
    import torch
    import vlm
    import weights

    from megatron_mimo_coord import MegatronMIMOInfra

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}

    def prepare(model: Any) -> None:
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(
        evolve(case.shape(), config=bf16),
        infra,
        prepare=prepare,
    )
    assert all(len(ddp.buffers) == 2 for ddp in vlm.submodules(model).values())
    return infra, model


def _overlap_of(case: Case, bare: bool) -> list[tuple[int, int]]:
    """Launches of each step, of this package or of Megatron's DDP as it is."""
    from types import SimpleNamespace

    import vlm
    from cases import _data, _forward_step
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_without_interleaving,
    )
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

    from megatron_mimo_coord import MultiModuleCoordinator
    from megatron_mimo_coord.layout import ModuleGrid
    from megatron_mimo_coord.layout.batch import data_parallel_slice

    steps: list[list[int]] = []
    with _traced(steps):
        infra, model = _two_dtypes(case)
        here = vlm.submodules(model)
        config = model.config
        rank = infra.module_to_grid_map["language"] and __import__("torch").distributed.get_rank()
        if bare:

            @contextmanager
            def no_sync() -> Iterator[None]:
                with ExitStack() as stack:
                    for ddp in here.values():
                        stack.enter_context(ddp.no_sync())
                    yield

            def finalize(*_: Any, **__: Any) -> None:
                for name, ddp in here.items():
                    groups = infra.pg_collections[name]
                    finalize_model_grads([ddp], None, pg_collection=groups)

            config.no_sync_func, config.finalize_model_grads_func = no_sync, finalize
            coordinator: Any = SimpleNamespace(
                gradient_scaling_factors=here,
                data_parallel_slice=lambda size, name: data_parallel_slice(
                    size, ModuleGrid.of(name, infra.module_to_grid_map[name]), rank
                ),
            )
            groups = {name: infra.pg_collections[name] for name in here}
            collection = MultiModuleProcessGroupCollection(
                module_pgs=groups,
                language_model_module_name="language" if "language" in here else None,
            )
            communicator = MultiModulePipelineCommunicator(
                infra.module_to_grid_map,
                infra.topology,
                config,
                dim_mapping={"s": 0, "b": 1, "h": 2},
                module_output_ndim=infra.module_output_ndim,
            )
        else:
            coordinator = MultiModuleCoordinator(infra, model)
            coordinator.attach(config)
            communicator = coordinator.build_pipeline_communicator(config)
            collection = coordinator.schedule_pg_collection
        for step in range(case.steps):
            steps.append([])
            for ddp in here.values():
                ddp.zero_grad_buffer()
            forward_backward_pipelining_without_interleaving(
                forward_step_func=partial(_forward_step, case, coordinator),
                data_iterator=_data(case, step),
                model=[model],
                num_microbatches=case.num_microbatches,
                seq_length=case.sequence,
                micro_batch_size=case.micro_batch_size,
                p2p_communicator=communicator,
                pg_collection=collection,
            )
    model.destroy()
    infra.destroy()
    return _early(steps)


def test_as_many_launches_during_backward_as_bare_ddp():
    case = Case(modules=LAYOUTS["fan-in, pipeline"], steps=2, ddp=MANY_BUCKETS)
    ours = world(4).run("test_launch_order:_overlap_of", case, False)
    bare = world(4).run("test_launch_order:_overlap_of", case, True)
    assert [steps[1] for steps in ours] == [steps[1] for steps in bare]
    # Both kinds of ranks, and stages behind the first have one bucket group a buffer.
    assert all(early > 0 for (_, (early, _)) in ours[:3])


def _launches(case: Case) -> list[tuple[int, int]]:
    from cases import train

    steps: list[list[int]] = [[]]
    with _traced(steps):
        for _ in train(case):
            steps.append([])
    return _early(steps[: case.steps])


def test_overlap_stays_on_for_the_steps_that_can_have_it():
    images = {"vision": (((1,),), ((1,),), ((1, 1, 0, 0),), ((1,),))}
    case = Case(modules=FAN_IN, images=images, steps=4, ddp=MANY_BUCKETS)
    first, second, language = world(3).run("test_launch_order:_launches", case)
    for rank in (first, second, language):
        early, number = rank[0]
        assert early == 0 and number > 2, "Megatron counts gradients in the first batch"
    assert first[1] == second[1] == first[2] == first[3] == second[3]
    early, number = first[1]
    assert number - early <= 2, "the bias and the weight that backward reaches last"
    assert second[2][0] == 0, "no image on this rank"
    assert all(early for early, _ in language[1:])


# -- one order -------------------------------------------------------------------------------------


def _order(case: Case) -> list[tuple[tuple[int, ...], int]]:
    """(ranks, numbers) of every all-reduce of the case's steps on this rank."""
    import torch.distributed as dist
    from cases import train

    events: list[tuple[tuple[int, ...], int]] = []
    all_reduce = dist.all_reduce

    def recorded(tensor: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        ranks = (
            range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
        )
        events.append((tuple(ranks), tensor.numel()))
        return all_reduce(tensor, *args, group=group, **kwargs)

    with replaced(dist, all_reduce=recorded):
        for _ in train(case):
            pass
    return events


ON_SHARED_RANKS = {name: parallel(dp=2, rank_offset=0) for name in ("vision", "audio", "language")}


@pytest.mark.parametrize(
    "case",
    [
        Case(
            modules=FAN_IN,
            images={"vision": (((1,),), ((1,), (0, 0, 1, 1)), ((1,), (1, 1, 0, 0)), ((1,),))},
            ddp=MANY_BUCKETS,
            per_token=PER_TOKEN,
            steps=4,
        ),
        Case(
            modules=ON_SHARED_RANKS,
            images={
                "vision": (((1,),), ((0, 0, 1, 1),), ((1, 1, 0, 0),), ((1,),)),
                "audio": (((1,),), ((1,),), ((0, 0, 1, 1),), ((1,),)),
            },
            ddp=MANY_BUCKETS,
            per_token=PER_TOKEN,
            steps=4,
        ),
        Case(
            modules={
                "vision": parallel(),
                "language": parallel(dp=2, expert_model_parallel_size=2),
            },
            experts=4,
            ddp=MANY_BUCKETS,
            steps=2,
        ),
    ],
    ids=["disjoint", "shared ranks", "experts"],
)
def test_ranks_that_share_groups_launch_on_them_in_one_order(case):
    events = world(case.world_size).run("test_launch_order:_order", case)
    for left, right in combinations(range(case.world_size), 2):
        seen = [
            [(ranks, size) for ranks, size in events[rank] if {left, right} <= set(ranks)]
            for rank in (left, right)
        ]
        assert seen[0] == seen[1], (left, right)


def _first_launches(case: Case) -> list[int]:
    """Sizes of what finalize launches where backward launched nothing, the token count last."""
    import torch
    import torch.distributed as dist

    infra, model, coordinator = built(case)
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def recorded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    coordinator.zero_grad_buffer()
    with replaced(dist, all_reduce=recorded):
        coordinator.finalize_model_grads([model], torch.ones((), dtype=torch.int, device="cuda"))
    vision, language = (ddp for ddp, _ in coordinator.module_to_grid_tuples)
    expected = [[buffer.grad_data.numel() for buffer in ddp.buffers] for ddp in (vision, language)]
    infra.destroy()
    return [sizes, [*expected[0], *expected[1], 1]]


def test_finalize_launches_encoders_then_language_then_tokens():
    modules = {"vision": parallel(dp=2, rank_offset=0), "language": parallel(dp=2, rank_offset=0)}
    case = Case(modules=modules, ddp=OVERLAP, per_token=PER_TOKEN)
    for sizes, expected in world(2).run("test_launch_order:_first_launches", case):
        assert sizes[: len(expected)] == expected


# -- gathered parameters, several optimizer instances ----------------------------------------------


def _gathers(case: Case) -> list[int]:
    """Gathers that a step launches with Megatron's forward hooks on, off, and on again."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    started: list[Any] = []
    start = Group.start_param_sync

    def counted(group: Any, *args: Any, **kwargs: Any) -> None:
        started.append(group)
        start(group, *args, **kwargs)

    infra, model, coordinator = built(case)
    ddps = [ddp for ddp, _ in coordinator.module_to_grid_tuples]
    numbers = []
    with replaced(Group, start_param_sync=counted):
        for is_on in (True, False, True):
            started.clear()
            coordinator.zero_grad_buffer()
            for ddp in () if is_on else ddps:
                ddp.disable_forward_pre_hook(param_sync=False)
            with coordinator.no_sync():
                numbers.append(len(started))
            coordinator.start_param_sync()
            assert len(started) == numbers[-1]
            coordinator.finalize_model_grads([model])
            for ddp in () if is_on else ddps:
                ddp.enable_forward_pre_hook()
    infra.destroy()
    return numbers


def test_parameters_are_gathered_only_while_forward_waits_for_them():
    ddp = {**SHARDED, **MANY_BUCKETS, "overlap_param_gather": True}
    for on, off, again in world(3).run("test_launch_order:_gathers", Case(modules=FAN_IN, ddp=ddp)):
        assert on == again > 1
        assert off == 0


def _several_instances() -> list[set[float]]:
    """Gradients of three steps with two optimizer instances; the coordinator is not attached."""
    import torch.distributed as dist
    import weights

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    ddp_settings = {**SHARDED, **MANY_BUCKETS, "num_distributed_optimizer_instances": 2}
    case = Case(modules={"language": parallel(dp=4)}, ddp=ddp_settings)
    infra = MegatronMIMOInfra.build(case.modules)
    groups = infra.pg_collections["language"]
    intra, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    inter, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    groups.intra_dp_cp = groups.intra_expt_dp = intra
    groups.inter_dist_opt = inter
    model = weights.build_model(case.shape(), infra)
    MultiModuleCoordinator(infra, model)
    ddp = model.language_model
    seen = []
    for _ in range(3):
        ddp.zero_grad_buffer()
        for group in ddp.bucket_groups:
            for param in group.params:
                param.main_grad.fill_(1.0 + dist.get_rank())
                group.register_grad_ready(param)
        ddp.finish_grad_sync()
        shards = [
            bucket.grad_data.chunk(2)[dist.get_rank(intra)]
            for group in ddp.bucket_groups
            for bucket in group.buckets
        ]
        seen.append({float(value) for shard in shards for value in shard.unique()} - {0.0})
    dist.destroy_process_group(intra)
    dist.destroy_process_group(inter)
    infra.destroy()
    return seen


def test_several_optimizer_instances_reduce_without_being_attached():
    for seen in world(4).run("test_launch_order:_several_instances"):
        assert seen == [{2.5}] * 3
