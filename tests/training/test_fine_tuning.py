"""What people do after the first training: stages, adapters, rates, states of ranks, base weights."""

import json
import logging
import queue
from functools import partial
from pathlib import Path
from typing import Any

import cases
import pytest
from attrs import frozen
from cases import Case
from layouts import PER_TOKEN, SHARDED
from ranks import world
from test_checkpoints import refusal, whole_tensors
from test_checkpoints_of_models import PIPELINED, TENSOR_PARALLEL, AdaptedCase
from trainings import GatedCase

from megatron_mimo_coord import checkpoint_steps

ADAPTER = "language_model.decoder.layers.1.adapter.weight"
CODES = "language_model.decoder.layers.1.codes"  # beside it, and frozen
NORMS = {  # which Megatron keeps under the names that they have where they are fused
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
FROZEN = {"frozen": ("vision.", "language."), "trainable": ("adapter",)}
SETTINGS = {"clip_grad": 0.0}


def on_layouts(make: Any = Case, **settings: Any) -> tuple[Case, Case]:
    """A case on two layouts of four ranks, its optimizer sharded on the first."""
    return (
        make(modules=TENSOR_PARALLEL, ddp=SHARDED, per_token=PER_TOKEN, **settings),
        make(modules=PIPELINED, per_token=PER_TOKEN, **settings),
    )


def saved_tensors(one: Any, folder: Path, step: int = 2) -> dict[str, Any]:
    """What a training holds, whole."""
    saved = one.coordinator.save_checkpoint(folder, one.optimizer, step=step)
    return whole_tensors(saved.path)


def content(folder: Path, step: int) -> dict[str, Any]:
    """What a manifest says."""
    return json.loads((folder / f"step-{step:08}" / "checkpoint.json").read_text())["content"]


class Lines(logging.Handler):
    """What the package logs meanwhile."""

    def __enter__(self) -> list[str]:
        self.found: list[str] = []
        logging.getLogger("megatron_mimo_coord").addHandler(self)
        return self.found

    def __exit__(self, *_: object) -> None:
        logging.getLogger("megatron_mimo_coord").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


# -- stages ----------------------------------------------------------------------------------------


def stages(folder: Path, first: list[Case], second: list[Case]) -> list[str]:
    """Train one stage, then another whose trainable parameters differ, as one process would."""
    import torch
    from trainings import training

    expected = []
    with training(first[0], **SETTINGS) as one:
        with cases.not_rehearsed():
            oracle = cases.Oracle(first[0])
            for step in range(4):
                if step == 2:
                    oracle.case = second[0]
                    for name, parameter in oracle.parameters.items():
                        parameter.requires_grad = not second[0].is_frozen(name)
                expected.append(oracle.backward(step))
                oracle.update()
        losses = [loss for loss, _ in one.steps(0, 1)]
        before = saved_tensors(one, folder / "first")
    assert losses == pytest.approx(expected[:2], rel=1e-5)
    for number, case in enumerate(second):
        with training(case, **SETTINGS) as one:
            load = one.coordinator.load_checkpoint
            said = refusal(load, folder / "first", one.optimizer, strict=True)
            assert "the checkpoint has no optimizer.state.exp_avg" in said
            one.steps(0)  # of which nothing is left
            with Lines() as lines:
                load(folder / "first", one.optimizer)
            after = saved_tensors(one, folder / f"second {number}")
            for key, tensor in after.items():
                want = before.get(key, torch.zeros_like(tensor))
                assert torch.equal(tensor, want), key
            steps = {}
            for saved in content(folder / f"second {number}", 2)["optimizer"].values():
                steps |= saved["steps"]
            for key, count in steps.items():
                assert count == (2 if f"optimizer.state.exp_avg.{key}" in before else 0), key
            assert set(steps.values()) == {0, 2}
            losses = [loss for loss, _ in one.steps(2, 3)]
            assert losses == pytest.approx(expected[2:], rel=1e-5)
    return lines


def test_stages_go_on_with_the_moments_of_what_stays(tmp_path):
    first = on_layouts(frozen=("vision.encoders", "language.decoder.layers.1."))
    second = on_layouts(frozen=("language.embedding", "vision.input_projections"))
    lines, *others = world(4).run(stages, tmp_path, first, second)
    (line,) = lines
    assert "has no optimizer state, which begins anew, for 1" in line
    assert "parameters of module 'vision'" in line and "parameters of module 'language'" in line
    assert not any(others), "one rank says it"


# -- adapters --------------------------------------------------------------------------------------


@frozen(kw_only=True)
class WrappedCase(Case):
    """One whose second language layer has its projection inside another module."""

    def build_model(self, infra: Any) -> Any:
        import weights
        from megatron.core.transformer import MegatronModule

        class Wrapper(MegatronModule):
            def __init__(self, config: Any, to_wrap: Any) -> None:
                super().__init__(config)
                self.to_wrap = to_wrap

            def forward(self, hidden: Any) -> Any:
                return self.to_wrap(hidden)

        def prepare(model: Any) -> None:
            for layer in getattr(getattr(model.language_model, "decoder", None), "layers", ()):
                if layer.layer_number == 2:
                    attention = layer.self_attention
                    attention.linear_proj = Wrapper(layer.config, attention.linear_proj)

        return weights.build_model(self.shape(), infra, prepare=prepare)


def adapters(folder: Path, bases: list[Case], adapted: list[Case], wrapped: list[Case]) -> None:
    import torch
    from trainings import training

    with training(bases[0]) as one:
        one.steps(0, 1)
        base = saved_tensors(one, folder / "base")
    weights = {key for key in base if not key.startswith("optimizer.")}
    for number, case in enumerate(adapted):
        with training(case) as one:
            load, save = one.coordinator.load_checkpoint, one.coordinator.save_checkpoint
            assert f"has no {ADAPTER}" in refusal(load, folder / "base", None)
            with Lines() as lines:
                loaded = load(folder / "base", None, strict=False)
            assert loaded.missing_keys == [ADAPTER, CODES] and loaded.unexpected_keys == []
            assert bool(lines) == (one.coordinator._job.rank == 0)
            assert all("2 parameters of module 'language': decoder" in line for line in lines)
            if number:
                loaded = load(folder / "adapter 0", one.optimizer)
                assert loaded.step == 3 and loaded.missing_keys == sorted({*weights, CODES})
            else:
                one.steps(2)
                save(folder / "adapter 0", one.optimizer, step=3, trainable_only=True)
            path = save(folder / f"both {number}", one.optimizer, step=3).path
            found = whole_tensors(path)
            assert all(torch.equal(found[key], base[key]) for key in weights)
            if number == 0:
                expected, undisturbed = found, one.steps(3)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)
            losses = undisturbed if number == 0 else one.steps(3)
            assert losses[0] == pytest.approx(undisturbed[0], rel=1e-5)
    kept = {key for key in content(folder / "adapter 0", 3)["tensors"] if "extra" not in key}
    assert {key.partition("language_model")[2] for key in kept} == {ADAPTER[14:]}
    for case in wrapped:
        with training(case) as one:
            load = one.coordinator.load_checkpoint
            assert ".to_wrap.weight" in refusal(load, folder / "base", one.optimizer)
            assert load(folder / "base", one.optimizer, names={".to_wrap.": "."}).step == 2
            found = saved_tensors(one, folder / str(len(case.ddp)))
            found = {key.replace(".to_wrap.", "."): found[key] for key in found}
            assert found.keys() == base.keys()
            assert all(torch.equal(found[key], base[key]) for key in found)


def test_adapters_are_saved_alone_and_loaded_over_a_base(tmp_path):
    world(4).run(
        adapters,
        tmp_path,
        on_layouts(),
        on_layouts(AdaptedCase, **FROZEN),
        on_layouts(WrappedCase),
    )


# -- chosen steps, states of ranks, another precision ----------------------------------------------


def choose(folder: Path, bases: list[Case]) -> None:
    import torch
    import torch.distributed as dist
    from trainings import training

    rank = dist.get_rank()
    order = torch.arange(4, dtype=torch.int16).view(2, 2)
    fingerprints = {}
    with training(bases[0]) as one:
        for step in (1, 2, 3):
            one.steps(step)
            fingerprints[step] = one.fingerprint()
            state = {"at": 10 * rank + step, "order": order + rank, "raw": bytes([rank, 255])}
            one.coordinator.save_checkpoint(
                folder, one.optimizer, step=step, rank_state=state, keep=3
            )
    assert checkpoint_steps(folder) == [1, 2, 3]
    for case in bases:
        with training(case) as one:
            load, save = one.coordinator.load_checkpoint, one.coordinator.save_checkpoint
            said = refusal(load, folder, one.optimizer, step=7)
            assert "has no checkpoint of step 7, but of [1, 2, 3]" in said
            loaded = load(folder, one.optimizer, step=2)
            assert loaded.step == 2
            if case is bases[0]:
                assert one.fingerprint() == fingerprints[2]
                assert not loaded.rank_states
                states = {rank: loaded.rank_state}
            else:
                assert loaded.rank_state is None
                states = dict(enumerate(loaded.rank_states))
                assert len(states) == 4
            for number, state in states.items():
                assert state["at"] == 10 * number + 2
                assert torch.equal(state["order"], order + number)
                assert state["order"].dtype == torch.int16 and state["raw"] == bytes([number, 255])
            one.steps(3)
            said = refusal(save, folder, one.optimizer, step=4)
            assert "has a checkpoint of step 3, and this training goes on from step 2" in said
            assert checkpoint_steps(folder) == [1, 2, 3]


def cast(folder: Path, cases: list[Case]) -> None:
    """fp32 into bf16, wrapped in three ways, and back: fp32 copies are the weights, bit for bit."""
    import torch
    from trainings import training

    with training(cases[0]) as one:
        one.steps(0, 1)
        expected = saved_tensors(one, folder / "0")
    weights = {key for key in expected if not key.startswith("optimizer.")}
    for number, case in enumerate(cases[1:], 1):
        with training(case) as one:
            if not case.wrap:
                said = refusal(
                    one.coordinator.load_checkpoint,
                    folder / str(number - 1),
                    one.optimizer,
                    strict=True,
                )
                assert "is bfloat16 in the checkpoint, float32 here" in said
            one.coordinator.load_checkpoint(folder / str(number - 1), one.optimizer)
            found = saved_tensors(one, folder / str(number))
        for key, tensor in expected.items():
            want = tensor.bfloat16() if key in weights and case.wrap else tensor
            assert torch.equal(found[key], want), (number, key)
        masters = {f"optimizer.state.fp32_param.{key}" for key in weights} & found.keys()
        assert bool(masters) == bool(case.wrap)
        for key in masters:
            assert torch.equal(
                found[key], expected[key.removeprefix("optimizer.state.fp32_param.")]
            )


def test_a_chosen_step_comes_back_with_the_states_of_ranks(tmp_path):
    world(4).run(choose, tmp_path, on_layouts())


def test_another_precision_keeps_what_fp32_there_is(tmp_path):
    whole, other = on_layouts()
    around_each, around_all = (
        Case(modules=case.modules, ddp=case.ddp, per_token=PER_TOKEN, wrap=wrap)
        for case, wrap in ((other, "submodules"), (whole, "model"))
    )
    world(4).run(cast, tmp_path, [whole, around_each, around_all, other])


# -- rates -----------------------------------------------------------------------------------------


def schedule(optimizer: Any, **settings: Any) -> Any:
    """Megatron's scheduler: two steps of warm-up, then linear to zero."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.1,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        **settings,
    )


def alone(case: Case, at: Any) -> list[float]:
    """Losses of the same training in one process; the rate of the encoder is a tenth of ``at``."""
    import torch

    with cases.not_rehearsed():
        oracle = cases.Oracle(case)
        parts = [
            [each for name, each in oracle.parameters.items() if name.startswith(module)]
            for module in ("vision", "language")
        ]
        oracle.optimizer = torch.optim.Adam([{"params": part} for part in parts], **cases.ADAM)
        losses = []
        for step in range(4):
            for group, factor in zip(oracle.optimizer.param_groups, (0.1, 1.0), strict=True):
                group["lr"] = factor * at(step)
            losses.append(oracle.backward(step))
            oracle.update()
    return losses


def rates(folder: Path, bases: list[Case]) -> None:
    import torch
    from megatron.core.optimizer import ParamKey
    from trainings import training

    def at(step: int) -> float:
        return 0.1 * (step / 2 if step <= 2 else 1 - (step - 2) / 8)

    overrides = {"vision": {"max_lr": 0.01, "min_lr": 0.0}}
    expected: list[float] = []
    found: list[list[float]] = []
    for number, case in enumerate([bases[0], *bases]):
        with training(case, overrides=overrides, min_lr=0.0, **SETTINGS) as one:
            expected = expected or alone(case, at)
            scheduler = schedule(one.optimizer)
            step, extra = one.coordinator.load_checkpoint(folder, one.optimizer)
            assert step == (2 if number else 0)
            if step:
                scheduler.load_state_dict(extra["scheduler"])
            losses = []
            while step < 4:
                losses += [loss for loss, _ in one.steps(step)]
                step += 1
                scheduler.step(1)
                for name, info in one.optimizer.module_infos.items():
                    rate = at(step) * (0.1 if name == "vision" else 1.0)
                    for group in info.optimizer.param_groups if info.is_active else ():
                        if group["params"]:
                            assert group["lr"] == pytest.approx(rate, rel=1e-9)
                if step == 2 and not number:
                    extra = {"scheduler": scheduler.state_dict()}
                    save = one.coordinator.save_checkpoint
                    save(folder, one.optimizer, step=2, extra=extra)
            assert losses == pytest.approx(expected[-len(losses) :], rel=1e-5)
            found.append(losses)
    assert found[1] == found[0][2:], "on the same layout, bit for bit"
    still = {"vision": {"max_lr": 0.0, "min_lr": 0.0}, ParamKey(name="*embed*"): {"max_lr": 0.0}}
    with training(bases[1], overrides={"language": {"max_lr": 0.05}}, **SETTINGS) as one:
        build = partial(cases.optimizer_of, bases[1], one.coordinator)
        assert "there is no module 'visoin'" in refusal(build, overrides={"visoin": {}})
        assert "'vision' has no rate: config_overrides may have max_lr" in refusal(
            build, overrides={"vision": {"rate": 1.0}}
        )
        said = refusal(build, overrides={**still, "vision": {"max_lr": 0.5}})
        assert "Conflicting overrides for" in said
    with training(bases[1], overrides=still, weight_decay=0.1, **SETTINGS) as one:
        named = dict(one.model.named_parameters())
        before = {name: each.detach().clone() for name, each in named.items()}
        one.steps(0, 1)
        for name, parameter in named.items():
            is_still = "modality" in name or "embed" in name
            assert torch.equal(parameter, before[name]) == is_still, name


def test_rates_of_modules_follow_megatrons_scheduler(tmp_path):
    world(4).run(rates, tmp_path, on_layouts())


# -- weights from elsewhere ------------------------------------------------------------------------


def whole_state(case: Case) -> dict[str, Any]:
    """A language model's weights in one process, as in none of the tests' models."""
    with cases.not_rehearsed():
        module = case.build_whole_model().language_model
        state = {
            name: 1.5 * each + 0.25
            for name, each in module.state_dict().items()
            if each is not None
        }
    return {name: each for name, each in state.items() if "_extra_state" not in name}


def write_in_this_process(filesystem: Any) -> None:
    """Megatron gathers results through a process of its own, which takes long, and wants psutil."""
    filesystem._results_queue = queue.Queue()
    filesystem._process_memory = lambda: 0


def refused_weights(one: Any, state: dict[str, Any]) -> None:
    """What is said of weights that do not fit, and what is loaded of them nevertheless."""
    import torch

    load = one.coordinator.load_weights
    others = {name: each for name, each in state.items() if "final_layernorm" not in name}
    others["head.weight"] = torch.ones(2)
    said = refusal(load, "language", others)
    assert "has no language_model.decoder.final_layernorm.weight" in said
    assert "there is no module 'text'" in refusal(load, "text", state)
    wrong = state | {"output_layer.weight": state["output_layer.weight"][:, :8]}
    assert "is [16, 8] in the checkpoint, [16, 16] here" in refusal(load, "language", wrong)
    loaded = load("language", others, strict=False)
    assert loaded.unexpected_keys == ["language_model.head.weight"]
    norm = "language_model.decoder.final_layernorm"
    assert loaded.missing_keys == [f"{norm}.bias", f"{norm}.weight"]


def is_loaded(state: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether a checkpoint has the weights of a model in one process."""
    import torch

    for name, tensor in state.items():
        key = f"language_model.{name}"
        for here, there in NORMS.items():
            key = key.replace(here, there)
        key, _, expert = key.partition(".local_experts.")
        index, _, rest = expert.partition(".")
        saved = found[f"{key}.experts.{rest}"][int(index)] if expert else found[key]
        if not torch.equal(saved, tensor):
            return False
    return True


def pretrained(folder: Path, bases: list[Case]) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from trainings import training

    whole, other = bases
    # On the second layout no encoder has replicas by TP, which Megatron writes twice.
    with training(other, lr=0.0, **SETTINGS) as one:
        state = whole_state(other)
        refused_weights(one, state)
        renamed = {name.replace("decoder.", "model."): each for name, each in state.items()}
        one.coordinator.load_weights("language", renamed, names={"decoder.": "model."})
        one.steps(0)  # of a rate of 0
        found = saved_tensors(one, folder / "module")
        assert is_loaded(state, found)
        path = folder / "megatron"
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        write_in_this_process(filesystem_async)
        dist_checkpointing.save(one.model.sharded_state_dict(), str(path))
    with training(whole, lr=0.0, **SETTINGS) as one:
        load = one.coordinator.load_checkpoint
        assert "give None in the place" in refusal(load, path, one.optimizer)
        assert load(path, None) == (0, {})
        one.steps(0)
        again = saved_tensors(one, folder / "again")
        weights = [key for key in found if not key.startswith("optimizer.")]
        assert all(torch.equal(again[key], found[key]) for key in weights)
        doubled = {name: 2 * each for name, each in state.items()}
        one.coordinator.load_weights("language", doubled)
        assert is_loaded(doubled, saved_tensors(one, folder / "doubled"))


def test_weights_of_a_module_and_of_another_trainer_are_loaded(tmp_path):
    world(4).run(pretrained, tmp_path, on_layouts(GatedCase, experts=4))
