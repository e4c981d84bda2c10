"""Checkpoints of models that are not alike everywhere: fp16, frozen layers, modules of one's own."""

import logging
from pathlib import Path
from typing import Any

import pytest
import vlm
from attrs import evolve, frozen
from cases import Case
from layouts import FAN_IN, SHARDED, parallel
from ranks import world
from test_checkpoints import refusal, whole_tensors

TENSOR_PARALLEL = {"vision": parallel(tp=2), "language": parallel(pp=2)}
PIPELINED = {"vision": parallel(pp=2), "language": parallel(tp=2)}


@frozen(kw_only=True)
class HalfCase(Case):
    """One in fp16."""

    def shape(self) -> Any:
        import torch

        half = {"bf16": False, "fp16": True, "params_dtype": torch.float16}
        shape = super().shape()
        return evolve(shape, config={**shape.config, **half, "pipeline_dtype": torch.float16})


@frozen(kw_only=True)
class AdaptedCase(Case):
    """One whose second language layer has an adapter, of integers too, which no other layer has."""

    def build_model(self, infra: Any) -> Any:
        import cases
        import torch
        import weights

        def adapt(layer: Any) -> None:
            layer.adapter = torch.nn.Linear(4, 4, bias=False)
            torch.nn.init.constant_(layer.adapter.weight, 0.5)
            codes = torch.full((4,), 2, dtype=torch.int8, device="cuda")
            layer.codes = torch.nn.Parameter(codes, requires_grad=False)

            def add(_: Any, __: Any, outputs: Any) -> Any:
                hidden, *rest = outputs
                first = hidden[..., :4]
                hidden = torch.cat(
                    [first + layer.adapter(first * layer.codes), hidden[..., 4:]], -1
                )
                return (hidden, *rest)

            layer.mlp.register_forward_hook(add)

        def prepare(model: Any) -> None:
            for layer in getattr(getattr(model.language_model, "decoder", None), "layers", ()):
                if layer.layer_number == 2:
                    adapt(layer)
            cases._prepare(self, infra.pg_collections, model)

        return weights.build_model(self.shape(), infra, prepare=prepare)


def scaler_states(one: Any) -> list[tuple[float, int, int]]:
    found = []
    for info in one.optimizer.module_infos.values():
        for inner in getattr(info.optimizer, "chained_optimizers", [info.optimizer]):
            if inner is not None and getattr(inner, "grad_scaler", None):
                state = inner.grad_scaler.state_dict()
                found.append((float(state["scale"]), *list(state.values())[1:]))
    return found


def half_saved_and_loaded(folder: Path, first: Case, other: Case) -> None:
    from trainings import training

    settings = {
        "bf16": False,
        "fp16": True,
        "initial_loss_scale": 2.0**30,
        "loss_scale_window": 1000,
        "hysteresis": 2,
    }
    with training(first, **settings) as one:
        for step in range(4):
            one.coordinator.zero_grad_buffer()
            one.run(step)
            one.optimizer.step()
        saved = scaler_states(one)
        one.coordinator.save_checkpoint(folder, one.optimizer, step=4)
    assert saved[0] != (2.0**30, 0, 2), "Inf was found"
    assert set(saved) == {saved[0]}
    for case in (first, other):
        with training(case, **settings) as one:
            assert scaler_states(one)[0] == (2.0**30, 0, 2)
            one.coordinator.load_checkpoint(folder, one.optimizer)
            found = scaler_states(one)
            assert set(found) == {saved[0]}
            assert [type(number) for number in found[0]] == [float, int, int]


def test_a_dynamic_loss_scale_comes_back_bit_for_bit(tmp_path):
    first, other = (
        HalfCase(modules=modules, wrap="submodules", ddp=ddp)
        for modules, ddp in (
            (FAN_IN, {}),
            ({"vision": parallel(), "language": parallel(dp=2)}, SHARDED),
        )
    )
    world(3).run(half_saved_and_loaded, tmp_path, first, other)


# -- layers that differ ----------------------------------------------------------------------------


def uneven_saved_and_loaded(folder: Path, cases: list[Case]) -> list[str]:
    import torch
    from trainings import training

    with training(cases[0]) as one:
        one.steps(0, 1)
        expected = whole_tensors(
            one.coordinator.save_checkpoint(folder / "0", one.optimizer, step=2).path
        )
        undisturbed = one.steps(2, 3)
    for number, case in enumerate([*cases[1:], cases[0]], 1):
        with training(case) as one:
            one.coordinator.load_checkpoint(folder / str(number - 1), one.optimizer)
            save = one.coordinator.save_checkpoint
            found = whole_tensors(save(folder / str(number), one.optimizer, step=2).path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)
            losses = one.steps(2, 3)
    assert losses == undisturbed, "on the same layout, bit for bit"
    return sorted(expected)


VISION, LANGUAGE = "vision.encoders.transformer.block", "language.decoder"
TRAINABLE = ("input_layernorm", "pre_mlp_layernorm", "adapter")


def test_layers_that_differ_are_saved_and_loaded_on_every_layout(tmp_path):
    """A frozen layer; one of which the norms are trained, and an adapter that no other has."""
    cases = [
        AdaptedCase(
            modules=modules,
            ddp=ddp,
            frozen=(f"{VISION}.layers.0.", f"{LANGUAGE}.layers.1."),
            trainable=tuple(f"decoder.layers.1.{name}" for name in TRAINABLE),
        )
        for modules, ddp in ((TENSOR_PARALLEL, SHARDED), (PIPELINED, {}))
    ]
    keys, *others = world(4).run(uneven_saved_and_loaded, tmp_path, cases)
    assert all(other == keys for other in others)
    moments = [key for key in keys if key.startswith("optimizer.state.exp_avg.")]
    weights = [key for key in keys if not key.startswith("optimizer.")]
    assert [key for key in weights if "adapter" in key] == [
        "language_model.decoder.layers.1.adapter.weight"
    ]
    untrained = {key for key in weights if f"optimizer.state.exp_avg.{key}" not in moments}
    assert len(untrained) < len(weights)
    of_norms = {key for key in weights if "layer_norm" in key or "layernorm" in key}
    for layer, is_whole in ((".block.layers.0.", True), (".decoder.layers.1.", False)):
        frozen = {key for key in untrained if layer in key}
        assert frozen and bool(frozen & of_norms) == is_whole
        untrained -= frozen
    assert not untrained


# -- replicas that are none ------------------------------------------------------------------------


def refuse_shards_as_replicas(folder: Path, case: Case) -> str:
    """What a save says of a plain module around tensor-parallel layers."""
    import torch
    from trainings import training

    with training(case) as one:
        ddp = one.coordinator._job.ddps.get("vision")
        if ddp is not None:
            encoder = ddp.module.encoders["transformer"]
            ddp.module.encoders["transformer"] = plain = torch.nn.Module()
            plain.block = encoder.block
            plain.inner = torch.nn.ModuleList(
                child for name, child in encoder.named_children() if name != "block"
            )
        return refusal(one.coordinator.save_checkpoint, folder, one.optimizer, step=1)


def test_shards_that_megatron_calls_replicas_are_refused_on_every_rank(tmp_path):
    case = Case(modules={"vision": parallel(tp=2), "language": parallel()})
    for said in world(3).run(refuse_shards_as_replicas, tmp_path, case):
        assert (
            "block.layers.0.self_attention.linear_qkv.weight of module 'vision' is one of 2" in said
        )
        assert "derive the module from MegatronModule and set its tp_group" in said
    assert not list(tmp_path.glob("*")), "nothing was written"


def refuse_replicas(folder: Path, case: Case, module: str, changed: str) -> str:
    """What a save says, and logs, where replicas of a module hold another weight and buffer."""
    import torch
    from trainings import training

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with training(case) as one:
        job = one.coordinator._job
        if module in job.ddps:
            inside = job.ddps[module].module
            inside.register_buffer("seen", torch.full((2,), float(job.rank), device="cuda"))
            with torch.no_grad():
                inside.get_parameter(changed).add_(0.5 * job.rank)
        logging.getLogger("megatron_mimo_coord").addHandler(handler)
        said.append(refusal(one.coordinator.save_checkpoint, folder, one.optimizer, step=1))
        logging.getLogger("megatron_mimo_coord").removeHandler(handler)
    return "\n".join(said)


@pytest.mark.parametrize(
    ("modules", "module", "weight", "ranks"),
    [
        (
            {"vision": parallel(tp=2), "language": parallel()},
            "vision",
            "encoders.transformer.embed.weight",
            [0, 1],
        ),
        (
            {"vision": parallel(), "language": parallel(dp=2)},
            "language",
            "embedding.word_embeddings.weight",
            [1, 2],
        ),
    ],
    ids=["tensor", "data"],
)
def test_replicas_that_differ_are_refused_on_every_rank(modules, module, weight, ranks, tmp_path):
    everyone = world(3).run(refuse_replicas, tmp_path, Case(modules=modules), module, weight)
    for said in everyone:
        assert f"{weight} of module {module!r} is not the same on the" in said
        assert f"-parallel ranks {ranks}" in said
    logged = "of the buffers seen, of which a checkpoint keeps the first" in everyone[ranks[0]]
    assert logged == (module == "language")
    assert not list(tmp_path.glob("*")), "nothing was written"


# -- groups ----------------------------------------------------------------------------------------


def save_without_groups(folder: Path, cases: list[Case], initialize: bool) -> None:
    """Save and load where no module carries groups, and ``parallel_state`` has others or none."""
    from megatron.core import parallel_state
    from trainings import training

    undisturbed: Any = None
    for number, case in enumerate(cases):
        with training(case) as one:
            if initialize:
                parallel_state.destroy_global_memory_buffer()  # the infra's, which is there
                parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
            kept = []
            try:
                for ddp in one.coordinator._job.ddps.values():
                    for module in ddp.module.modules():
                        if isinstance(module, vlm.Encoder):
                            del module.tp_group
                    kept.append((ddp.module, ddp.module.pg_collection))
                    ddp.module.pg_collection = None
                if number == 0:
                    one.steps(0)
                else:
                    one.coordinator.load_checkpoint(folder / str(number - 1), one.optimizer)
                save = one.coordinator.save_checkpoint
                path = save(folder / str(number), one.optimizer, step=1).path
            finally:
                for module, groups in kept:
                    module.pg_collection = groups
                if initialize:
                    parallel_state.destroy_model_parallel()
            found = {key: value.tolist() for key, value in whole_tensors(path).items()}
            undisturbed = undisturbed or found
            assert found == undisturbed


@pytest.mark.parametrize("initialize", [False, True], ids=["none", "others"])
def test_the_groups_are_those_of_the_infra(initialize, tmp_path):
    layouts = (PIPELINED, TENSOR_PARALLEL) if initialize else (TENSOR_PARALLEL, PIPELINED)
    cases = [Case(modules=modules, tied_embeddings=True) for modules in layouts]
    world(4).run(save_without_groups, tmp_path, cases, initialize)


# -- a background save that failed -----------------------------------------------------------------


def fail_in_the_background(folder: Path) -> list[str]:
    import torch.distributed as dist
    from trainings import training

    open_ = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".distcp":
            raise OSError(28, "No space left on device")
        return open_(path, *args, **options)

    with training(Case(modules=FAN_IN)) as one:
        Path.open = full
        try:
            saving = one.coordinator.save_checkpoint(folder, one.optimizer, step=1, background=True)
            saving._thread.join()
        finally:
            Path.open = open_
        dist.barrier()
        said = [refusal(one.coordinator.zero_grad_buffer), refusal(one.coordinator.grad_norms)]
        said.append(refusal(saving.wait))
        one.coordinator.zero_grad_buffer()
        return said


def test_a_background_save_that_failed_is_told_by_the_next_call(tmp_path):
    for said in world(3).run(fail_in_the_background, tmp_path):
        assert all("step-00000001 could not be written" in each for each in said)
        assert all("No space left on device" in each for each in said)
