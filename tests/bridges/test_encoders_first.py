"""Encoders on ranks of a pipelined language model: what travels, what is kept, what is refused."""

import weakref
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from typing import Any

import cases
import pytest
import stock
import torch
import torch.distributed as dist
from attrs import evolve
from cases import Case
from layouts import VARYING, parallel
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from ranks import world

from megatron_mimo_coord.bridges.shared_bridges import SharedBridges
from megatron_mimo_coord.cpu import no_host_sync

SHARED = {
    "vision": parallel(dp=4, rank_offset=0),
    "language": parallel(pp=2, dp=2, rank_offset=0),
}


class HalfCase(Case):
    """One in fp16."""

    def shape(self) -> Any:
        shape = super().shape()
        half = {"bf16": False, "fp16": True, "params_dtype": torch.float16}
        return evolve(shape, config={**shape.config, **half, "pipeline_dtype": torch.float16})

    def build_model(self, infra: Any) -> Any:
        with cases._replaced(torch.nn.Module, "bfloat16", torch.nn.Module.half):
            return super().build_model(infra)


CASE = Case(modules=SHARED, images=VARYING, num_microbatches=4, assign=1)
HIDDEN = 16


class _InterruptError(Exception):
    """Of a forward step."""


def _counted(case: Case) -> dict[str, Any]:
    """What a step did on this rank, the one after a step that was cut short in either phase."""
    infra, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)
    counts = {"batches": 0, "sent": 0, "received": 0, "fetched": 0, "forward": 0}
    batch, data, step = dist.batch_isend_irecv, cases._data, cases._forward_step
    calls: list[int] = []
    stop_at = -1

    def count_batch(ops: list[dist.P2POp]) -> Any:
        assert len({(op.op, op.peer) for op in ops}) == len(ops), "one message to each peer"
        counts["batches"] += 1
        for op in ops:
            counts["sent" if op.op is dist.isend else "received"] += op.tensor.numel() // HIDDEN
        return batch(ops)

    def fetch() -> Any:
        for each in data(case, 0):
            counts["fetched"] += 1
            yield each

    def forward_step(case: Case, coordinator: Any, batches: Any, model: Any) -> Any:
        calls.append(0)
        if len(calls) == stop_at:
            raise _InterruptError
        return step(case, coordinator, batches, model)

    def run(forward_only: bool = False) -> Any:
        if not forward_only:
            coordinator.zero_grad_buffer()
        batches = fetch()
        return cases.run_schedule(case, model, coordinator, communicator, batches, forward_only)

    def watched(name: str) -> Any:
        original = getattr(SharedBridges, name)

        def call(*args: Any) -> Any:
            with cases._replaced(dist, "batch_isend_irecv", count_batch), no_host_sync():
                return original(*args)

        return SharedBridges, name, call

    with ExitStack() as stack:
        for owner, name, value in (watched("deliver"), watched("_give_back")):
            stack.enter_context(cases._replaced(owner, name, value))
        stack.enter_context(cases._replaced(cases, "_forward_step", forward_step))
        stop_at = 2
        with suppress(_InterruptError):
            run()
        calls.clear()
        stop_at = -1
        for module in model.modality_submodules.values():
            module.module.register_forward_hook(
                lambda *_: counts.update(forward=counts["forward"] + 1)
            )
        counts |= dict.fromkeys(counts, 0)
        run()
        counts["calls"] = len(calls)
        norms = {name: float(norm) for name, norm in coordinator.grad_norms().items()}
    model.destroy()
    infra.destroy()
    return {**counts, "norms": norms, "norms alone": _norms_alone(case)}


def _norms_alone(case: Case, step: int = 0) -> dict[str, float]:
    """Norms of each module's gradient in one process."""
    oracle = cases.Oracle(case)
    with cases.not_rehearsed():
        oracle.backward(step)
    norms = dict.fromkeys(case.modules, 0.0)
    for name, parameter in oracle.parameters.items():
        if parameter.grad is not None:
            norms[name.split(".")[0]] += float(parameter.grad.norm()) ** 2
    return {name: square**0.5 for name, square in norms.items()}


def test_a_step_sends_each_token_once_and_reads_nothing_from_the_device():
    ranks = world(4).run(_counted, CASE)
    assert {each["calls"] for each in ranks} == {8} and {each["fetched"] for each in ranks} == {4}
    # Two of four ranks hold the first stage; what the others encode goes there, and comes back.
    assert all(each["batches"] <= 2 for each in ranks)
    assert sum(each["sent"] for each in ranks) == sum(each["received"] for each in ranks)
    for each in ranks:
        assert each["norms"] == pytest.approx(each["norms alone"], rel=1e-5)


def _read_ahead(case: Case) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Norms of two steps whose loader deals out each microbatch before the one before it runs."""
    infra, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)

    def batches() -> Any:
        before = None
        for each in chain(cases._data(case, 0), cases._data(case, 1)):
            dealt = evolve(each, assignments=cases._assign(case, coordinator, each))
            if before is not None:
                yield before
            before = dealt
        yield before

    data, found = batches(), []
    for step in range(2):
        coordinator.zero_grad_buffer()
        cases.run_schedule(case, model, coordinator, communicator, data)
        norms = {name: float(norm) for name, norm in coordinator.grad_norms().items()}
        found.append((norms, _norms_alone(case, step)))
    model.destroy()
    infra.destroy()
    return found


def test_images_of_the_next_step_may_be_dealt_out_within_a_step():
    modules = {"vision": parallel(dp=2, rank_offset=0), "language": parallel(pp=2, rank_offset=0)}
    for steps in world(2).run(_read_ahead, Case(modules=modules, images=VARYING, assign=1)):
        for norms, alone in steps:
            assert norms == pytest.approx(alone, rel=1e-5)


def test_activations_of_so_many_microbatches_are_kept():
    for keep, forwards in ((None, 4), (1, 7), (0, 8)):
        case = evolve(CASE, encoder_microbatches=keep, images={}, assign=0)
        kept = 4 if keep is None else keep
        for of_one, before, most, run, images in world(4).run(_kept, case):
            assert of_one > 0 and before == kept * of_one
            assert most == max(kept, 1) * of_one and run == forwards and not images
    frozen = evolve(CASE, frozen=("vision.",), encoder_microbatches=0, images={}, assign=0)
    for each in world(4).run(_counted, frozen):
        assert each["forward"] == 4 and each["batches"] <= 1


class _Saved:
    """What autograd keeps for an encoder's backward."""

    alive = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # an output would keep its own graph
        _Saved.alive += 1
        _Saved.most = max(_Saved.most, _Saved.alive)

    def __del__(self) -> None:
        _Saved.alive -= 1


def _kept(case: Case) -> tuple[int, int, int, int, int]:
    """How many tensors are kept of the encoders' forward: of one microbatch, before the language
    model runs, and at most in their backward; how many forwards there were, and of how many
    microbatches the images are kept after the step."""
    infra, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)
    images: list[weakref.ref[torch.Tensor]] = []
    found: list[int] = []
    _Saved.alive = _Saved.most = 0

    def deliver(*args: Any) -> Any:
        found.append(_Saved.alive)
        return original_deliver(*args)

    def give_back(*args: Any) -> Any:
        _Saved.most = _Saved.alive
        return original_give_back(*args)

    def encode(*args: Any, **kwargs: Any) -> Any:
        images.append(weakref.ref(kwargs["encoder_inputs"]["images"]))
        with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
            output = original_encode(*args, **kwargs)
        if not found:
            found.append(_Saved.alive)
        return output

    encoder = model.modality_submodules["vision"].module
    original_deliver, original_give_back = SharedBridges.deliver, SharedBridges._give_back
    original_encode = encoder.forward
    coordinator.zero_grad_buffer()
    with (
        cases._replaced(SharedBridges, "deliver", deliver),
        cases._replaced(SharedBridges, "_give_back", give_back),
        cases._replaced(encoder, "forward", encode),
    ):
        cases.run_schedule(case, model, coordinator, communicator, cases._data(case, 0))
    model.destroy()
    infra.destroy()
    of_one, before = found
    alive = sum(image() is not None for image in images)
    return of_one, before, _Saved.most, len(images), alive


def _check_without_data(case: Case) -> int:
    """A stage in the midst, which encodes nothing, is given no iterator."""
    data, step = cases._data, cases._forward_step

    def no_data(case: Case, step: int) -> Any:
        return None if dist.get_rank() == 1 else data(case, step)

    def forward_step(case: Case, coordinator: Any, batches: Any, model: Any) -> Any:
        if batches is None:
            return model(input_ids=None)[0], None
        return step(case, coordinator, batches, model)

    with (
        cases._replaced(cases, "_data", no_data),
        cases._replaced(cases, "_forward_step", forward_step),
    ):
        return cases.check(case)


def test_a_rank_that_reads_no_data_needs_none():
    modules = {"vision": parallel(rank_offset=2), "language": parallel(pp=3, rank_offset=0)}
    case = Case(modules=modules, images=VARYING, layers=3)
    assert sum(world(3).run(_check_without_data, case)) > 0


def _fails(case: Case, phase: str) -> None:
    """On one rank an exception ends a step in one of its phases."""
    if dist.get_rank() != 1:
        list(cases.train(case))
        return
    step, calls, at = cases._forward_step, [], {"forward": 2, "language": 6}.get(phase)

    def forward_step(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == at:
            raise _InterruptError
        return step(*args)

    def fail(_: Any) -> None:
        raise _InterruptError

    def hook(infra: Any, model: Any) -> None:
        if phase == "backward":
            encoder = model.modality_submodules["vision"].module
            encoder.register_forward_hook(lambda _, __, output: output.register_hook(fail) and None)

    with cases._replaced(cases, "_forward_step", forward_step):
        list(cases.train(case, built=hook))


@pytest.mark.parametrize("phase", ["forward", "language", "backward"])
def test_an_exception_in_any_phase_ends_all_ranks(phase):
    _, errors = world(4).try_run(_fails, evolve(CASE, images={}, no_optimizer=True), phase)
    assert errors.keys() == {0, 1, 2, 3}
    assert errors[1][0] == "_InterruptError"
    assert all(name == "RuntimeError" for rank, (name, _) in errors.items() if rank != 1)


def _scaled_norms(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Norms of each module's gradient in fp16 with a loss scale, and in one process in fp32."""
    infra, model, coordinator = cases.built(case)
    optimizer = cases.optimizer_of(
        case, coordinator, bf16=False, fp16=True, initial_loss_scale=2.0**8
    )
    coordinator.attach(model.config, optimizer)
    communicator = coordinator.build_pipeline_communicator(model.config)
    coordinator.zero_grad_buffer()
    cases.run_schedule(case, model, coordinator, communicator, cases._data(case, 0))
    norms = {name: float(norm) for name, norm in coordinator.grad_norms().items()}
    model.destroy()
    infra.destroy()
    return norms, _norms_alone(Case(modules=case.modules, num_microbatches=case.num_microbatches))


def test_the_loss_scale_reaches_the_encoders_gradients():
    case = HalfCase(modules=SHARED, num_microbatches=2, wrap="submodules")
    for norms, alone in world(4).run(_scaled_norms, case):
        assert norms == pytest.approx(alone, rel=0.02)


def _with_megatrons_schedule(case: Case) -> None:
    _, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)
    coordinator.zero_grad_buffer()
    schedule = cases.forward_backward_pipelining_without_interleaving
    with cases._replaced(coordinator, "forward_backward_func", lambda **o: schedule(**_bare(o))):
        cases.run_schedule(case, model, coordinator, communicator, cases._data(case, 0))


def _bare(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("encoder")}


def test_megatrons_own_schedule_is_refused_on_every_rank():
    answers, errors = world(4).try_run(_with_megatrons_schedule, CASE)
    assert not answers
    for name, text in errors.values():
        assert name == "RuntimeError" and "call coordinator.forward_backward_func(...)" in text


# -- what a second forward leaves behind -----------------------------------------------------------

COUNTING = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def _trained_anew(case: stock.StockCase) -> tuple[Any, Any]:
    """The infra and the model after a step, of which alone Megatron's tracker knows."""
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    infra, model, coordinator = cases.built(case)
    communicator = coordinator.build_pipeline_communicator(model.config)
    coordinator.zero_grad_buffer()
    cases.run_schedule(case, model, coordinator, communicator, cases._data(case, 0))
    return infra, model


def _counts(case: stock.StockCase) -> tuple[Any, dict[str, Any]]:
    """Tokens of each expert of this rank's encoder, and what is known of its auxiliary losses."""
    infra, model = _trained_anew(case)
    tokens = [
        buffer.tolist()
        for name, buffer in model.modality_submodules.named_buffers()
        if name.endswith("local_tokens_per_expert")
    ]
    losses = {
        name: each.values.tolist() for name, each in get_moe_metrics_tracker().metrics.items()
    }
    infra.destroy()
    return tokens, losses


def test_encoders_that_run_again_count_their_tokens_once():
    case = stock.StockCase(
        modules={
            "vision": parallel(dp=2, rank_offset=0),
            "language": parallel(pp=2, rank_offset=0),
        },
        num_microbatches=3,
        images={"vision": (((1, 2, 0, 1), (2, 0, 1, 0), (1, 1, 1, 3)),)},
        configs={"vision": stock.mixture(**COUNTING)},
        no_optimizer=True,
    )
    kept, again = ([*world(2).run(_counts, evolve(case, encoder_microbatches=k))] for k in (3, 1))
    assert again == kept
    for tokens, losses in kept:
        assert sum(map(sum, tokens)) > 0 and losses


def _reported(case: stock.StockCase) -> tuple[float, float]:
    """What this rank has recorded of an auxiliary loss, and what Megatron reports of all ranks."""
    infra, _ = _trained_anew(case)
    tracker, total = get_moe_metrics_tracker(), {}
    here = float(tracker.metrics["load_balancing_loss"].values.sum())
    groups = infra.pg_collections["language"]
    tracker.report(1.0, 0, num_layers=1, total_loss_dict=total, pg_collection=groups)
    infra.destroy()
    return here, float(total["load_balancing_loss"])


@pytest.mark.parametrize("language", [{}, stock.mixture(**COUNTING)], ids=["dense", "mixture"])
def test_a_deeper_mixture_on_one_stage_is_reported_on_all(language):
    case = stock.StockCase(
        modules={"vision": parallel(rank_offset=0), "language": parallel(pp=2, rank_offset=0)},
        configs={"vision": stock.mixture(**COUNTING, num_layers=3), "language": language},
        no_optimizer=True,
    )
    here, reported = zip(*world(2).run(_reported, case), strict=True)
    assert here[0] > 0
    assert reported == pytest.approx([sum(here)] * 2)


def _with_too_few_batches(case: cases.Case) -> None:
    _, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    coordinator.zero_grad_buffer()
    coordinator.forward_backward_func(
        forward_step_func=partial(cases._forward_step, case, coordinator),
        data_iterator=iter([*cases._data(case, 0)][:-1]),
        model=model,
        num_microbatches=case.num_microbatches,
        seq_length=case.sequence,
        micro_batch_size=case.micro_batch_size,
        p2p_communicator=coordinator.build_pipeline_communicator(model.config),
    )


@pytest.mark.parametrize("offset", [0, 1], ids=["shared", "own"])
def test_batches_that_end_within_a_step(offset):
    stages = 2 - offset
    language = parallel(pp=stages, rank_offset=offset)
    case = cases.Case(modules={"vision": parallel(rank_offset=0), "language": language})
    answers, errors = world(2).try_run(_with_too_few_batches, case)
    assert not answers
    assert any("data_iterator ran out within a step" in text for _, text in errors.values())
