"""Lines that a trainer forgets: each is told at once, on every rank, with the cure."""

from contextlib import nullcontext
from copy import copy
from functools import partial
from math import nan
from time import monotonic
from typing import Any

import pytest
from attrs import evolve, frozen
from cases import Case, built
from layouts import COLOCATED, FAN_IN, FAN_OUT, LAYOUTS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world

from megatron_mimo_coord.layout import pack, runs_encoders_first

SKEWED = {"vision": (((1, 1, 0, 0), (1, 1, 1, 1)),)}
SHARED = {
    "vision": parallel(dp=2, rank_offset=0),
    "language": parallel(pp=2, rank_offset=0),
}


@frozen(kw_only=True)
class AuxiliaryLossCase(Case):
    """A mixture of experts, whose auxiliary loss has a gradient where all tokens are masked too."""

    def shape(self) -> Any:
        shape = super().shape()
        auxiliary = {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"}
        return evolve(shape, config={**shape.config, **auxiliary})


class Trainer:
    """A trainer whose lines a test can leave out."""

    def __init__(self, case: Case) -> None:
        from megatron.core.optimizer import OptimizerConfig

        self.case = case
        self.infra, self.model, self.coordinator = built(case)
        self.optimizer = self.coordinator.build_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.01,
                clip_grad=1.0,
                use_distributed_optimizer=bool(case.ddp.get("use_distributed_optimizer")),
            )
        )
        self.communicator = self.coordinator.build_pipeline_communicator(self.model.config)

    def schedule(self, **options: Any) -> Any:
        from cases import _data, _forward_step
        from megatron.core.pipeline_parallel.schedules import (
            forward_backward_pipelining_without_interleaving,
        )

        run: Any = forward_backward_pipelining_without_interleaving
        if runs_encoders_first(pack(self.case.modules)):
            run = self.coordinator.forward_backward_func
        options = {
            "forward_step_func": partial(_forward_step, self.case, self.coordinator)
        } | options
        return run(
            data_iterator=_data(self.case, 0),
            model=[self.model],
            num_microbatches=self.case.num_microbatches,
            seq_length=self.case.sequence,
            micro_batch_size=self.case.micro_batch_size,
            p2p_communicator=self.communicator,
            pg_collection=self.coordinator.schedule_pg_collection,
            **options,
        )

    def step(self) -> None:
        """Nothing is left out."""
        self.optimizer.zero_grad()
        self.coordinator.zero_grad_buffer()
        self.coordinator.reduce_losses(self.schedule())
        self.coordinator.grad_norms()
        assert self.optimizer.step()[0]

    def end(self) -> None:
        self.model.destroy()
        self.infra.destroy()


def said_by(*calls: Any) -> str:
    """What is said by the first of some calls that raises; none waits for long."""
    start = monotonic()
    try:
        for call in calls:
            call()
    except (RuntimeError, ValueError) as error:
        assert monotonic() - start < 10, "seconds until this rank hears of it"
        return str(error)
    return ""


def _unattached(case: Case, on_a_copy: bool) -> list[str]:
    """What is said by whatever a trainer calls next, and by a right step afterwards."""
    trainer = Trainer(case)
    coordinator = trainer.coordinator
    if on_a_copy:
        coordinator.attach(copy(trainer.model.config), trainer.optimizer)
    coordinator.zero_grad_buffer()
    losses = trainer.schedule()
    said = [
        said_by(partial(coordinator.reduce_losses, losses)),
        said_by(coordinator.grad_norms),
        said_by(coordinator.zero_grad_buffer),
        said_by(trainer.optimizer.step),
    ]
    trainer.end()
    return said


@pytest.mark.parametrize("on_a_copy", [False, True], ids=["forgotten", "copy"])
@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN, images=SKEWED, ddp={**OVERLAP, **SHARDED}, per_token=PER_TOKEN),
        Case(modules=COLOCATED),
        Case(modules=SHARED, images=SKEWED, ddp=OVERLAP),
    ],
    ids=["overlap", "colocated", "shared, stages"],
)
def test_attach_forgotten_or_on_a_copy(case, on_a_copy):
    for said in world(case.world_size).run("test_traps:_unattached", case, on_a_copy):
        for text in said:
            assert "gradients were accumulated, but finalize_model_grads did not run" in text
            assert ("no copy of it" if on_a_copy else "call coordinator.attach(") in text


def _forgotten_lines(case: Case) -> dict[str, str]:
    """What is said of lines that are forgotten or in another order; right steps go before."""
    import torch

    trainer = Trainer(case)
    coordinator = trainer.coordinator
    coordinator.attach(trainer.model.config, trainer.optimizer)
    trainer.step()
    said = {"norms after the step": said_by(coordinator.grad_norms)}
    trainer.schedule(forward_only=True)  # with gradients on, as a trainer may do
    coordinator.reduce_losses([])
    trainer.step()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    said["not zeroed"] = said_by(trainer.schedule)
    after = list(trainer.model.parameters())
    assert all(map(torch.equal, before, after))
    trainer.step()
    trainer.optimizer.zero_grad()
    said["zeroed by the optimizer alone"] = said_by(trainer.schedule)
    for ddp, _ in coordinator.module_to_grid_tuples:
        ddp.zero_grad_buffer()  # as Megatron's own training loop does
    trainer.schedule()
    assert trainer.optimizer.step()[0]
    trainer.end()
    return said


@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN, images=SKEWED, ddp={**OVERLAP, **SHARDED}, per_token=PER_TOKEN),
        Case(modules=COLOCATED),
        Case(modules=SHARED, images=SKEWED, ddp=OVERLAP),
    ],
    ids=["overlap", "colocated", "shared, stages"],
)
def test_lines_forgotten_in_a_step(case):
    for said in world(case.world_size).run("test_traps:_forgotten_lines", case):
        assert "grad_norms() was called after optimizer.step()" in said.pop("norms after the step")
        assert len(said) == 2
        for text in said.values():
            assert "zero_grad_buffer() was not called" in text


def _wrong_reports(case: Case, mistake: str) -> str:
    """What is said of a mistake in the forward step; a right step goes before and behind."""
    import torch
    from cases import _forward_step, draw

    trainer = Trainer(case)
    coordinator, model = trainer.coordinator, trainer.model
    coordinator.attach(model.config, trainer.optimizer)
    is_encoder = "language" not in trainer.infra.participating_modules

    def forward_step(data: Any, model: Any) -> Any:
        microbatch = next(data)
        data = iter([microbatch])
        if is_encoder and mistake in TEXTS:

            def with_other_text(**inputs: Any) -> Any:
                text = TEXTS[mistake](microbatch.tokens, inputs["input_ids"])
                if mistake == "whole, sliced by hand":
                    coordinator._texts.micro_batch_size = None
                return model(**inputs | {"input_ids": text})

            return _forward_step(case, coordinator, data, with_other_text)
        output, loss = _forward_step(case, coordinator, data, model)
        if mistake == "two values":
            return output, lambda losses: loss(losses)[::2]
        if mistake in MASKED:
            scale = MASKED[mistake]
            return output, lambda losses: (losses.sum() * scale, torch.tensor(0), loss(losses)[2])
        return output, loss

    trainer.step()
    if mistake == "whole, asked once":  # for the slices, before an evaluation of another size
        size = case.micro_batch_size
        asked = {
            n: coordinator.data_parallel_slice(size, n) for n in trainer.infra.participating_modules
        }
        with coordinator.evaluation():
            for name in asked:
                coordinator.data_parallel_slice(2 * size, name)
        coordinator.data_parallel_slice = lambda _, name: asked[name]
    if mistake == "no inputs":
        said = REPORTS[mistake]  # a rank without images is the only one to see it
        if is_encoder:
            said = said_by(partial(model, draw(case, 0, 0).tokens, modality_inputs={}))
        trainer.end()
        return said
    before = [parameter.detach().clone() for parameter in model.parameters()]
    coordinator.zero_grad_buffer()
    said = said_by(
        partial(trainer.schedule, forward_step_func=forward_step), trainer.optimizer.step
    )
    if said or mistake == "all masked, not finite":
        assert all(map(torch.equal, before, model.parameters()))
    trainer.step()
    trainer.end()
    return said


MASKED = {"all masked": 0, "all masked, not finite": nan}
TEXTS = {
    "whole input_ids": lambda whole, mine: whole,
    "whole, sliced by hand": lambda whole, mine: whole,
    "whole, asked once": lambda whole, mine: whole,
    "flattened input_ids": lambda whole, mine: mine.flatten()[None],
}


def _setup_faults() -> dict[str, str]:
    """What is said first, in the documented order, of what the set-up forgets."""
    import vlm
    import weights
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(FAN_IN)
    shape = Case(modules=FAN_IN).shape()
    model = weights.build_model(shape, infra)
    model.config.variable_seq_lengths = False
    parallel_state._GLOBAL_MEMORY_BUFFER = None
    get_cuda_rng_tracker().reset()
    said = {
        "before the model": said_by(partial(infra.stage_arguments, "language")),
        "global state": said_by(partial(MultiModuleCoordinator, infra, model)),
    }
    infra.initialize_megatron(1)
    infra.stage_arguments("language")
    name = infra.participating_modules[0]
    ddp = vlm.submodules(model)[name]
    if name == "vision":
        model.modality_submodules[name] = ddp.module
    said["no DDP"] = said_by(partial(MultiModuleCoordinator, infra, model))
    if name == "vision":
        model.modality_submodules[name] = ddp
    coordinator = MultiModuleCoordinator(infra, model)
    said["attach"] = said_by(partial(coordinator.attach, model.config))
    said["communicator"] = said_by(partial(coordinator.build_pipeline_communicator, model.config))
    coordinator.print_description(4)
    infra.destroy()
    return said


def test_the_set_up_is_told_what_it_forgets():
    for said in world(3).run("test_traps:_setup_faults"):
        for when in ("before the model", "global state"):
            assert "random states are not initialised" in said[when]
            assert "global memory buffer is not initialised" in said[when]
            assert "infra.initialize_megatron(seed)" in said[when]
        assert "module 'vision' is not wrapped in megatron.core.distributed" in said["no DDP"]
        for when in ("attach", "communicator"):
            assert "config.variable_seq_lengths is False: set it to True" in said[when]


REPORTS = {
    "two values": "no rank reported a number of tokens",
    "all masked": "",
    "all masked, not finite": "",
    "no inputs": "of input_ids its slice and not the whole microbatch",
    "whole input_ids": "module 'vision' has other samples than the language model: 4 on each of DP 2, where a microbatch has 4 in all",
    "flattened input_ids": "",
}


@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["plain", "sharded"])
def test_no_token_count_where_modules_are_colocated(ddp):
    case = Case(modules=COLOCATED, per_token=PER_TOKEN, ddp=ddp)
    for said in world(2).run("test_traps:_wrong_reports", case, "two values"):
        assert REPORTS["two values"] in said


@pytest.mark.parametrize("mistake", REPORTS)
def test_mistakes_of_a_forward_step(mistake):
    case = AuxiliaryLossCase(modules=FAN_IN, per_token=PER_TOKEN, ddp=SHARDED, experts=4)
    for said in world(3).run("test_traps:_wrong_reports", case, mistake):
        assert REPORTS[mistake] in said
        assert bool(said) == bool(REPORTS[mistake])


FAN_OUT_OF_TWO = Case(
    modules={"vision": parallel(dp=2), "language": parallel(dp=4)},
    micro_batch_size=8,
    images={"vision": (((0, 2, 1, 3, 1, 1, 1, 2), (0, 2, 1, 3, 0, 0, 0, 0)),)},
)


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        (Case(modules=FAN_IN, images=SKEWED), "whole input_ids"),
        (Case(modules=FAN_IN, images=SKEWED), "whole, sliced by hand"),
        (
            Case(modules=LAYOUTS["equal"], images={"vision": (((1, 2, 0, 0),),)}, ddp=OVERLAP),
            "whole input_ids",
        ),
        (FAN_OUT_OF_TWO, "whole input_ids"),
        (FAN_OUT_OF_TWO, "whole, asked once"),
    ],
    ids=["fan-in", "sliced by hand", "equal", "fan-out", "asked once"],
)
def test_the_whole_text_where_a_rank_has_no_image_or_several_receivers(case, mistake):
    for said in world(case.world_size).run("test_traps:_wrong_reports", case, mistake):
        assert "give each rank of 'vision' its slice" in said


def _assigned_ahead(case: Case) -> None:
    """Images are assigned before gradients are zeroed; the text of all samples is no mistake."""
    from cases import PATCHES, _forward_step, draw

    trainer = Trainer(case)
    coordinator = trainer.coordinator
    coordinator.attach(trainer.model.config, trainer.optimizer)
    is_encoder = "language" not in trainer.infra.participating_modules
    assigned = []
    for index in range(case.num_microbatches):
        tokens = [[PATCHES] * count for count in draw(case, 0, index).counts["vision"]]
        assigned.append(coordinator.assign_images("vision", tokens))

    def forward_step(data: Any, model: Any) -> Any:
        microbatch = next(data)
        counts = microbatch.counts["vision"]
        local = [sum(counts[:s]) + image for s, image in assigned[microbatch.index].local]
        images = microbatch.images["vision"][local]

        def fed(**inputs: Any) -> Any:
            if is_encoder:
                vision = {"images": images} if len(images) else None
                inputs |= {"input_ids": microbatch.tokens, "modality_inputs": {"vision": vision}}
            return model(**inputs)

        return _forward_step(evolve(case, assign=0), coordinator, iter([microbatch]), fed)

    coordinator.zero_grad_buffer()
    trainer.schedule(forward_step_func=forward_step)
    assert trainer.optimizer.step()[0]
    trainer.end()


def test_images_may_be_assigned_before_gradients_are_zeroed():
    world(3).run("test_traps:_assigned_ahead", Case(modules=FAN_IN, images=SKEWED))


def _without_watched_optimizer(case: Case) -> dict[str, str]:
    """What is said to a trainer whose optimizer the coordinator does not know."""
    import cases
    from cases import _data, _forward_step, run_schedule
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    infra, model, coordinator = built(case)
    optimizer = get_mimo_optimizer(
        model, OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=0.01)
    )
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)

    def two_values(*args: Any) -> Any:
        output, loss = _forward_step(*args)
        return output, lambda losses: loss(losses)[::2]

    def run() -> None:
        coordinator.zero_grad_buffer()
        run_schedule(case, model, coordinator, communicator, _data(case, 0))

    said = {}
    for name in ("right", "two values", "right again"):
        with (
            cases._replaced(cases, "_forward_step", two_values)
            if name == "two values"
            else nullcontext()
        ):
            said[name] = said_by(run, coordinator.grad_norms)
        optimizer.step()
    said["norms after the step"] = said_by(coordinator.grad_norms)
    infra.destroy()
    return said


def test_an_optimizer_that_the_coordinator_does_not_know():
    case = Case(modules=FAN_OUT, per_token=PER_TOKEN)
    for said in world(3).run("test_traps:_without_watched_optimizer", case):
        assert said.pop("right") == said.pop("two values") == ""
        assert "no rank reported a number of tokens" in said.pop("right again")
        assert "grad_norms() was called after optimizer.step()" in said.pop("norms after the step")


def _with_megatron_communicator(case: Case, attached: bool) -> str:
    """What is said of a forgotten attach, or else zero_grad_buffer, on ranks with and without images."""
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )

    trainer = Trainer(case)
    infra, coordinator = trainer.infra, trainer.coordinator
    trainer.communicator = MultiModulePipelineCommunicator(
        infra.module_to_grid_map,
        infra.topology,
        trainer.model.config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim=infra.module_output_ndim,
    )
    if attached:
        coordinator.attach(trainer.model.config, trainer.optimizer)
        trainer.step()
    said = said_by(trainer.schedule, coordinator.grad_norms)
    trainer.end()
    return said


@pytest.mark.parametrize("attached", [False, True])
def test_megatrons_communicator_and_a_rank_without_images(attached):
    case = Case(modules=LAYOUTS["equal"], images={"vision": (((1, 1, 0, 0),),)})
    for said in world(4).run("test_traps:_with_megatron_communicator", case, attached):
        assert (
            "zero_grad_buffer() was not called" if attached else "call coordinator.attach("
        ) in said


@pytest.mark.parametrize("names", [("vision", "audio"), ("audio", "vision")])
def test_encoders_that_share_ranks_read_their_own_rows_of_one_text(names):
    sharing = {"vision": parallel(dp=2, rank_offset=0), "audio": parallel(tp=2, rank_offset=0)}
    case = Case(
        modules={
            **{name: sharing[name] for name in names},
            "language": parallel(dp=2, rank_offset=2),
        },
        images={"vision": (((2, 1, 0, 0),),), "audio": (((0, 1, 2, 0),),)},
        per_token=PER_TOKEN,
    )
    world(4).run("cases:check", case)
