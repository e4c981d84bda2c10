"""What a trainer holds: built on real ranks, attached, and refused with a sentence."""

from functools import partial
from typing import Any

import pytest
from cases import Case, built
from layouts import COLOCATED, FAN_IN, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

from megatron_mimo_coord.layout import default_topology, pack


def on_ranks(function: str, *args: Any, size: int = 3) -> list[Any]:
    return world(size).run(f"test_coordinator:{function}", *args)


# -- what lives here -------------------------------------------------------------------------------


def _members(case: Case) -> dict[str, Any]:
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

    from megatron_mimo_coord import unwrap_mimo_model

    infra, model, coordinator = built(case)
    collection = coordinator.schedule_pg_collection
    assert isinstance(collection, MultiModuleProcessGroupCollection)
    assert unwrap_mimo_model(model) is model
    answer: dict[str, Any] = {
        "factors": dict(coordinator.gradient_scaling_factors),
        "modules": [type(module).__name__ for module, _ in coordinator.module_to_grid_tuples],
        "grids": [list(grid.shape) for _, grid in coordinator.module_to_grid_tuples],
        "language": collection.language_model_module_name,
        "description": coordinator.describe(4),
    }
    for name in ("active_module_pg", "gradient_scaling_factor"):
        try:
            answer[name] = getattr(coordinator, name)
        except RuntimeError as error:
            answer[name] = str(error)
    if not isinstance(answer["active_module_pg"], str):
        name, groups = answer["active_module_pg"]
        assert groups is infra.pg_collections[name]
        answer["active_module_pg"] = name
    try:
        answer["slice"] = coordinator.data_parallel_slice(4)
    except RuntimeError as error:
        answer["slice"] = str(error)
    answer["slices"] = {
        name: coordinator.data_parallel_slice(4, name) for name in infra.participating_modules
    }
    model.destroy()
    infra.destroy()
    return answer


def test_each_rank_knows_its_module():
    vision, other, language = on_ranks("_members", Case(modules=FAN_IN))
    assert vision["factors"] == {"vision": 2.0}
    assert vision["gradient_scaling_factor"] == 2.0
    assert vision["active_module_pg"] == "vision"
    assert vision["modules"] == ["DistributedDataParallel"]
    assert vision["grids"] == [[1, 1, 2, 1]]
    assert vision["language"] is None
    assert (vision["slice"], other["slice"]) == (slice(0, 2), slice(2, 4))
    assert language["language"] == "language"
    assert language["slice"] == slice(0, 4)
    assert vision["description"] == language["description"]
    assert "fan-in 2:1" in vision["description"]


def test_flags_of_other_ranks_reach_the_description():
    _, _, language = on_ranks("_members", Case(modules=FAN_IN, per_token={"vision": True}))
    assert language["factors"] == {"language": 1.0}
    rows = [line.split() for line in language["description"].splitlines()]
    assert rows[2][7] == "1", "vision's DDP sums, and the language model has one replica"


def test_colocated_ranks_hold_several_modules():
    first, second = on_ranks("_members", Case(modules=COLOCATED), size=2)
    assert first["factors"] == {"vision": 2.0, "language": 1.0}
    assert first["language"] == "language"
    for member, plural in (
        ("active_module_pg", "schedule_pg_collection"),
        ("gradient_scaling_factor", "gradient_scaling_factors"),
        ("slice", "module_name"),
    ):
        assert "vision, language" in first[member]
        assert plural in first[member]
    assert second["slices"] == {"vision": slice(2, 4), "language": slice(0, 4)}


def _foreign(kind: str) -> dict[str, Any]:
    """An infra of someone else's class, with the same attributes and no more."""
    from dataclasses import dataclass
    from types import SimpleNamespace

    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mimo_coord import MultiModuleCoordinator, validate_data_loader_contract

    @dataclass
    class MegatronMIMOInfra:  # as in Megatron-Bridge
        module_to_grid_map: dict
        topology: dict
        pg_collections: dict
        participating_modules: list
        module_output_ndim: dict

    @dataclass(frozen=True)
    class HeteroTopology:  # as in Megatron-LM's examples
        grids: dict
        module_pgs: dict

    infra, model, _ = built(Case(modules=FAN_IN))
    if kind == "Megatron-Bridge":
        names = MegatronMIMOInfra.__dataclass_fields__
        theirs = MegatronMIMOInfra(**{name: getattr(infra, name) for name in names})
    elif kind == "Megatron-LM":
        nowhere = ProcessGroupCollection(tp=None, cp=None, dp=None, pp=None)
        groups = {name: each or nowhere for name, each in infra.pg_collections.items()}
        theirs = HeteroTopology(infra.module_to_grid_map, groups)
    elif kind == "Megatron-LM's groups":
        collection = MultiModuleCoordinator(infra, model).schedule_pg_collection
        theirs = SimpleNamespace(grids=infra.module_to_grid_map, module_pgs=collection)
    else:
        names = ("module_to_grid_map", "pg_collections", "topology")
        theirs = SimpleNamespace(**{name: getattr(infra, name) for name in names})
    coordinator = MultiModuleCoordinator(theirs, model)
    communicator = coordinator.build_pipeline_communicator(model.config)
    validate_data_loader_contract(theirs, 8, 4, 2)
    coordinator.validate_data_loader_contract(8, 4, 2)
    coordinator.zero_grad_buffer()
    grads = [grad for ddp, _ in coordinator.module_to_grid_tuples for grad in ddp.buffers]
    for buffer in grads:
        buffer.grad_data.fill_(1 + torch.distributed.get_rank())
    coordinator.finalize_model_grads([model])
    infra.destroy()
    return {
        "factors": dict(coordinator.gradient_scaling_factors),
        "gradient": {float(value) for buffer in grads for value in buffer.grad_data.unique()},
        "stages": communicator.total_stages,
    }


@pytest.mark.parametrize(
    "kind", ["attributes alone", "Megatron-Bridge", "Megatron-LM", "Megatron-LM's groups"]
)
def test_any_infra_with_the_attributes_works(kind):
    first, second, language = on_ranks("_foreign", kind)
    assert first == second == {"factors": {"vision": 2.0}, "gradient": {3.0}, "stages": 2}
    assert language["gradient"] == {3.0}


# -- attach ----------------------------------------------------------------------------------------


def _attach(case: Case) -> dict[str, Any]:
    from megatron_mimo_coord import MultiModuleCoordinator

    infra, model, coordinator = built(case)
    config = model.config

    class Optimizer:
        def scale_loss(self, loss: Any) -> Any:
            return loss

    optimizer = Optimizer()
    answer: dict[str, Any] = {}
    coordinator.attach(config)
    answer["without optimizer"] = config.grad_scale_func is None
    coordinator.attach(config, optimizer)
    coordinator.attach(config, optimizer)
    answer["no_sync"] = config.no_sync_func == coordinator.no_sync
    answer["finalize"] = config.finalize_model_grads_func == coordinator.finalize_model_grads
    answer["scale"] = config.grad_scale_func == optimizer.scale_loss
    answer["grad_sync"] = config.grad_sync_func
    answer["param_sync"] = config.param_sync_func == coordinator.start_param_sync
    successor = MultiModuleCoordinator(infra, model)
    successor.attach(config, Optimizer())
    answer["successor"] = config.no_sync_func == successor.no_sync
    hooks = ("no_sync_func", "finalize_model_grads_func", "grad_scale_func")
    ours = {name: getattr(config, name) for name in hooks}
    config.no_sync_func, config.grad_scale_func = print, partial(print, model)
    others = {name: getattr(config, name) for name in vars(config) if name.endswith("_func")}
    try:
        successor.attach(config, optimizer)
    except ValueError as error:
        answer["taken"] = str(error)
    assert others == {name: getattr(config, name) for name in others}, "nothing is set then"
    for name, hook in ours.items():
        setattr(config, name, hook)
    config.variable_seq_lengths = False
    try:
        successor.attach(config)
    except ValueError as error:
        answer["shapes"] = str(error)
    infra.destroy()
    return answer


def test_attach_sets_hooks_and_respects_those_of_others():
    for answer in on_ranks("_attach", Case(modules=FAN_IN)):
        assert answer["without optimizer"]
        assert answer["no_sync"] and answer["finalize"] and answer["scale"] and answer["successor"]
        assert answer["grad_sync"] is None and not answer["param_sync"]
        assert answer["taken"] == (
            "the coordinator needs places that others have taken: config.no_sync_func is "
            "builtins.print, config.grad_scale_func is a partial of builtins.print; set "
            "config.no_sync_func = config.grad_scale_func = None before attach, and leave that to "
            "the coordinator"
        )
        assert "config.variable_seq_lengths is False" in answer["shapes"]


def test_overlap_adds_the_hooks_that_it_needs():
    overlap = {**OVERLAP, **SHARDED, "overlap_param_gather": True, "align_param_gather": True}
    for answer in on_ranks("_attach", Case(modules=FAN_IN, ddp=overlap)):
        assert answer["grad_sync"] is None and answer["param_sync"]


# -- what is refused -------------------------------------------------------------------------------


OF_WEIGHTS = (
    "another group",
    "converted",
    "moved",
    "frozen",
    "of the model",
    "trained too late",
    "no token",
)


def _break(fault: str, model: Any) -> None:
    """What is wrong with a model on a rank with an encoder."""
    import torch
    import torch.distributed as dist

    ddp = model.modality_submodules["vision"]
    encoder = ddp.module.encoders["transformer"]
    if fault == "another group":
        encoder.block.layers[1].mlp.linear_fc1.tp_group = dist.group.WORLD
    if fault == "converted":
        encoder.embed.double()
    if fault == "moved":
        encoder.embed.weight.data = encoder.embed.weight.detach().clone()
    if fault == "frozen":
        encoder.embed.weight.requires_grad = False
    if fault == "of the model":
        model.scale = torch.nn.Parameter(torch.ones(1, device="cuda"))
    if fault == "trained too late":
        ddp.module.late = torch.nn.Linear(2, 2)
    if fault == "no token":
        model.special_token_ids.clear()


def _refused(case: Case, fault: str) -> None:
    import torch.distributed as dist
    import vlm
    import weights
    from attrs import evolve

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    model = weights.build_model(case.shape(), infra)
    rank = dist.get_rank()
    if fault == "unwrapped" and rank == 0:
        model.modality_submodules["vision"] = model.modality_submodules["vision"].module
    if fault == "wrapped twice":
        from megatron.core.distributed import DistributedDataParallel

        groups = infra.pg_collections[infra.participating_modules[0]]
        ddp = next(iter(vlm.submodules(model).values()))
        DistributedDataParallel(model.config, ddp.ddp_config, model, pg_collection=groups)
    if fault == "lacking" and rank == 0:
        del model.modality_submodules["vision"]
    if fault == "groups" and rank == 2:
        infra = evolve(infra, pg_collections=dict.fromkeys(infra.pg_collections))
    if fault == "topology" and rank == 1:
        infra = evolve(infra, topology={"vision": ["language"]})
    if fault == "language flag" and rank == 2:
        model.config.calculate_per_token_loss = True
    if fault == "ddp" and rank == 0:
        model.modality_submodules["vision"].ddp_config.overlap_grad_reduce = True
    if fault == "gather buffer":
        for ddp in vlm.submodules(model).values():
            ddp.ddp_config.overlap_param_gather = True
            ddp.ddp_config.reuse_grad_buf_for_mxfp8_param_ag = True
    if fault == "layer-wise":
        for ddp in vlm.submodules(model).values():
            ddp.ddp_config.overlap_param_gather = True
    if fault == "multi-token prediction" and rank == 2:
        model.language_model.config.mtp_num_layers = 1
    if rank == 0 and fault in OF_WEIGHTS:
        _break(fault, model)
    if fault == "version" and rank == 0:
        from megatron_mimo_coord.checks import job

        job.megatron_version = "0.0"
    try:
        MultiModuleCoordinator(infra, model)
    finally:
        if fault == "version" and rank == 0:
            from megatron.core import __version__

            job.megatron_version = __version__
        infra.destroy()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unwrapped", "module 'vision' is not wrapped in megatron.core.distributed"),
        ("wrapped twice", "go to the buffers of another DDP"),
        ("lacking", "the model has no such module here"),
        ("groups", "no process groups for module 'language'"),
        ("topology", "language: topology: rank 1 has nothing, ranks 0, 2 have []"),
        ("gather buffer", "set reuse_grad_buf_for_mxfp8_param_ag=False"),
        ("layer-wise", "set use_distributed_optimizer=True, or overlap_param_gather=False"),
        ("language flag", "calculate_per_token_loss of the language model: rank 2 has True, "),
        ("ddp", "vision: overlap_grad_reduce: rank 0 has True, rank 1 has False"),
        ("multi-token prediction", "config has mtp_num_layers=1"),
        (
            "another group",
            "(encoders.transformer.block.layers.1.mlp.linear_fc1) are shared out over",
        ),
        ("converted", "after its DDP was put around it (encoders.transformer.embed.weight, "),
        ("frozen", "frozen after its DDP was put around it (encoders.transformer.embed.weight), "),
        ("moved", "after its DDP was put around it (encoders.transformer.embed.weight), and"),
        ("of the model", "scale of the model need a gradient, but no DDP reduces it"),
        ("trained too late", "modality_submodules.vision.late.weight, "),
        ("no token", "vision has no special token, by which a text says"),
        ("version", "megatron-core version: rank 0 has 0.0, ranks 1, 2 have"),
    ],
)
def test_a_fault_on_one_rank_is_said_on_every_rank(fault, message):
    ddp = SHARDED if fault in ("gather buffer", "moved", "frozen") else {}
    case = Case(modules=FAN_IN, ddp=ddp)
    answers, errors = world(3).try_run("test_coordinator:_refused", case, fault)
    assert not answers
    for name, text in errors.values():
        assert name == "ValueError", text
        assert message in text


def _refused_grids(vision: tuple, language: tuple) -> None:
    """Grids that someone else made, and that Megatron cannot run."""
    from types import SimpleNamespace

    import weights
    from megatron.core.hyper_comm_grid import HyperCommGrid

    from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism, MultiModuleCoordinator

    names = ["tp", "cp", "dp", "pp", "gtp_remat"]
    fine = MegatronMIMOInfra.build({"language": ModuleParallelism(data_parallel_size=4)})
    case = Case(modules={"language": ModuleParallelism(data_parallel_size=4)})
    model = weights.build_model(case.shape(), fine)
    infra = SimpleNamespace(
        module_to_grid_map={
            "vision": HyperCommGrid(list(vision[0]), names[: len(vision[0])], vision[1]),
            "language": HyperCommGrid(list(language[0]), names[: len(language[0])], language[1]),
        },
        pg_collections=fine.pg_collections,
        topology={"vision": ["language"], "language": []},
    )
    try:
        MultiModuleCoordinator(infra, model)
    finally:
        fine.destroy()


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        (((1, 2, 1, 1), 0), ((1, 1, 2, 1), 2), "module vision (ranks 0-1"),
        (((1, 1, 1, 1), 0), ((1, 1, 2, 1), 1), "rank 3 of 4 is in no module"),
        (((1, 1, 2, 2), 0), ((1, 1, 2, 2), 0), "runs colocated modules without a pipeline"),
        (((1, 1, 3, 1), 0), ((1, 1, 2, 1), 2), "overlap in part"),
        (((1, 1, 2, 1), 0), ((1, 1, 1, 1, 2), 2), "has a dim gtp_remat of size 2, of which nobody"),
    ],
)
def test_layouts_that_megatron_cannot_run_are_refused(vision, language, message):
    answers, errors = world(4).try_run("test_coordinator:_refused_grids", vision, language)
    assert not answers
    for name, text in errors.values():
        assert name == "ValueError", text
        assert message in text


def _wrong_argument(fault: str) -> None:
    from types import SimpleNamespace

    import torch
    from attrs import evolve

    from megatron_mimo_coord import MultiModuleCoordinator

    infra, model, _ = built(Case(modules=FAN_IN))
    sound = infra
    if torch.distributed.get_rank() == 1:
        if fault == "model":
            model = torch.nn.Linear(1, 1)
        if fault == "infra":
            infra = object()
        if fault == "no grid":
            infra = evolve(infra, module_to_grid_map={"vision": None, "language": None})
        if fault == "no groups":
            infra = SimpleNamespace(grids=infra.module_to_grid_map, module_pgs=None)
    try:
        MultiModuleCoordinator(infra, model)
    finally:
        sound.destroy()


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [
        ("model", "RuntimeError", "there is no MimoModel inside Linear"),
        ("infra", "ValueError", "infra is of class object, which has neither module_to_grid_map"),
        ("no grid", "AttributeError", "AttributeError: 'NoneType' object has no attribute"),
        ("no groups", "AttributeError", "AttributeError: 'NoneType' object has no attribute"),
    ],
)
def test_a_wrong_argument_on_one_rank_is_said_on_every_rank(fault, name, message):
    answers, errors = world(3).try_run("test_coordinator:_wrong_argument", fault)
    assert not answers
    assert [errors[rank][0] for rank in range(3)] == ["ValueError", name, "ValueError"]
    assert all(message in text for _, text in errors.values())
    assert "(says rank 1)" in errors[0][1]


def _disagree(fault: str) -> None:
    """Ranks that were started with different layouts, first grids and then coordinators."""
    import torch.distributed as dist
    import weights
    from megatron.core.hyper_comm_grid import HyperCommGrid

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    layouts = {
        "sizes": {"vision": parallel(tp=2), "language": parallel()},
        "offsets": {"vision": parallel(dp=2, rank_offset=1), "language": parallel(rank_offset=0)},
        "modules": {"vision": parallel(), "audio": parallel(), "language": parallel()},
    }
    other = layouts[fault] if dist.get_rank() == 1 else FAN_IN
    said = []
    try:
        MegatronMIMOInfra.build(other)
    except ValueError as error:
        said.append(str(error))
    infra = MegatronMIMOInfra.build(FAN_IN)
    model = weights.build_model(Case(modules=FAN_IN).shape(), infra)
    grids = {
        name: HyperCommGrid(list(grid.shape), list(grid.dim_names), grid.rank_offset)
        for name, grid in pack(other).items()
    }
    infra.module_to_grid_map.update(grids)
    infra.topology.update(default_topology(grids))
    try:
        MultiModuleCoordinator(infra, model)
    except ValueError as error:
        said.append(str(error))
    raise ValueError("\n=====\n".join(said))


@pytest.mark.parametrize(
    ("fault", "build", "construction"),
    [
        (
            "sizes",
            "vision: data_parallel_size: rank 1 has 1, ranks 0, 2 have 2\n",
            "vision: tensor_model_parallel_size: rank 1 has 2, ranks 0, 2 have 1\n",
        ),
        (
            "offsets",
            "language: rank_offset: rank 1 has 0, ranks 0, 2 have None",
            "language: rank_offset: rank 1 has 0, ranks 0, 2 have 2",
        ),
        (
            "modules",
            "the modules: rank 1 has vision, audio, language, ranks 0, 2 have vision, language",
            "the modules: rank 1 has vision, language, audio, ranks 0, 2 have vision, language",
        ),
    ],
)
def test_ranks_with_different_layouts_say_so_on_every_rank(fault, build, construction):
    answers, errors = world(3).try_run("test_coordinator:_disagree", fault)
    assert not answers
    for name, text in errors.values():
        assert name == "ValueError", text
        of_build, of_construction = text.split("\n=====\n")
        assert build in of_build
        assert construction in of_construction


def test_what_holds_no_mimo_model_is_refused():
    import torch

    from megatron_mimo_coord import unwrap_mimo_model

    with pytest.raises(RuntimeError, match="there is no MimoModel inside Linear"):
        unwrap_mimo_model(torch.nn.Linear(1, 1))


# -- the step --------------------------------------------------------------------------------------


def _sync_state() -> dict[str, Any]:
    infra, model, coordinator = built(Case(modules=COLOCATED, ddp=OVERLAP))
    ddps = [ddp for ddp, _ in coordinator.module_to_grid_tuples]

    def state() -> list[bool]:
        return [group.is_last_microbatch for ddp in ddps for group in ddp.bucket_groups]

    answer = {"before": state()}
    with coordinator.no_sync():
        answer["inside"] = state()
    answer["after"] = state()
    try:
        with coordinator.no_sync():
            raise KeyError("inside")
    except KeyError:
        answer["after an exception inside"] = state()

    def broken() -> None:
        raise KeyError("entering")

    ddps[1].no_sync = broken
    try:
        with coordinator.no_sync():
            pass
    except KeyError:
        answer["after an exception on entering"] = state()
    model.destroy()
    infra.destroy()
    return answer


def test_no_sync_leaves_every_module_as_it_was():
    for answer in on_ranks("_sync_state", size=2):
        inside = answer.pop("inside")
        assert len(inside) >= 2 and not any(inside)
        assert len(answer) == 4
        assert all(all(state) for state in answer.values()), answer


def _finalize_faults(per_token: bool) -> dict[str, str]:
    import torch

    case = Case(modules=FAN_IN, per_token=PER_TOKEN if per_token else {})
    infra, model, coordinator = built(case)
    tokens = torch.ones((), dtype=torch.int, device="cuda") if per_token else None
    wrong = None if per_token else torch.ones((), dtype=torch.int, device="cuda")
    answer = {}
    try:
        coordinator.finalize_model_grads([model], tokens)
    except RuntimeError as error:
        answer["outside"] = str(error)
    coordinator.zero_grad_buffer()
    if not per_token or "language" in infra.participating_modules:
        try:
            coordinator.finalize_model_grads([model], wrong)
        except ValueError as error:
            answer["tokens"] = str(error)
    coordinator.finalize_model_grads([model], tokens)
    try:
        coordinator.finalize_model_grads([model], tokens)
    except RuntimeError as error:
        answer["twice"] = str(error)
    with coordinator.no_sync():
        pass
    coordinator.finalize_model_grads([model], tokens)
    for ddp, _ in coordinator.module_to_grid_tuples:
        ddp.zero_grad_buffer()
    coordinator.finalize_model_grads([model], tokens)
    infra.destroy()
    infra.destroy()
    return answer


@pytest.mark.parametrize("per_token", [True, False])
def test_finalize_says_how_it_wants_to_be_called(per_token):
    answers = on_ranks("_finalize_faults", per_token)
    assert f"num_tokens is {'missing' if per_token else 'given'}" in answers[2]["tokens"]
    for answer in answers:
        assert "outside a step" in answer["outside"]
        assert "a second time in one step" in answer["twice"]


def _finalize_where_nothing_learns(case: Case) -> list[str]:
    """What a second finalize says, after a step and after an evaluation."""
    import torch

    infra, model, coordinator = built(case)
    said = []
    for grad in (torch.enable_grad, torch.no_grad):
        try:
            with grad():
                coordinator.finalize_model_grads([model])
        except RuntimeError as error:
            said.append(str(error))
        coordinator.zero_grad_buffer()
        coordinator.finalize_model_grads([model])
        with torch.no_grad(), coordinator.no_sync():
            pass  # as the schedule does with forward_only
        try:
            coordinator.finalize_model_grads([model])
        except RuntimeError as error:
            said.append(str(error))
    model.destroy()
    infra.destroy()
    return said


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "language"), ()])
def test_all_ranks_refuse_alike_whatever_is_frozen(frozen):
    case = Case(modules={"vision": parallel(pp=2), "language": parallel()}, frozen=frozen)
    for said in on_ranks("_finalize_where_nothing_learns", case):
        assert len(said) == 4
        assert all("a second time in one step" in text for text in said)


def _finalize_with_embedding_groups() -> bool:
    """An infra that gives encoders embedding groups too, as Megatron-Bridge's does."""
    from megatron_mimo_coord import MultiModuleCoordinator

    infra, model, _ = built(Case(modules={"vision": parallel(pp=2), "language": parallel()}))
    if "vision" in infra.participating_modules:
        infra.pg_collections["vision"].embd = infra.pg_collections["vision"].pp
    coordinator = MultiModuleCoordinator(infra, model)
    coordinator.zero_grad_buffer()
    coordinator.finalize_model_grads([model])
    return True


def test_encoders_may_have_embedding_groups():
    assert all(on_ranks("_finalize_with_embedding_groups"))
