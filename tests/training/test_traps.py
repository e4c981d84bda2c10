"""Lines that a trainer forgets: each is told at once, on every rank, with the cure."""

from copy import copy
from typing import Any

import pytest
from cases import Case, built
from layouts import COLOCATED, FAN_IN, OVERLAP, PER_TOKEN, SHARDED
from ranks import world

SKEWED = {"vision": (((1, 1, 0, 0), (1, 1, 1, 1)),)}


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
        from functools import partial

        from cases import _data, _forward_step
        from megatron.core.pipeline_parallel.schedules import (
            forward_backward_pipelining_without_interleaving,
        )

        options = {
            "forward_step_func": partial(_forward_step, self.case, self.coordinator)
        } | options
        return forward_backward_pipelining_without_interleaving(
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


def said_by(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except (RuntimeError, ValueError) as error:
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
        said_by(coordinator.reduce_losses, losses),
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
    ],
    ids=["overlap", "colocated"],
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
    ],
    ids=["overlap", "colocated"],
)
def test_lines_forgotten_in_a_step(case):
    for said in world(case.world_size).run("test_traps:_forgotten_lines", case):
        assert "grad_norms() was called after optimizer.step()" in said.pop("norms after the step")
        assert len(said) == 2
        for text in said.values():
            assert "zero_grad_buffer() was not called" in text


def _wrong_reports(case: Case, mistake: str) -> str:
    """What the optimizer's step says of a mistake in the forward step; a right step goes before."""
    from functools import partial

    import torch
    from cases import _forward_step, draw

    trainer = Trainer(case)
    coordinator, model = trainer.coordinator, trainer.model
    coordinator.attach(model.config, trainer.optimizer)

    def forward_step(data: Any, model: Any) -> Any:
        if mistake == "whole input_ids" and "vision" in trainer.infra.participating_modules:
            whole = draw(case, 0, 0).tokens

            def with_all(**inputs: Any) -> Any:
                return trainer.model(**inputs | {"input_ids": whole})

            return _forward_step(case, coordinator, data, with_all)
        output, loss = _forward_step(case, coordinator, data, model)
        if mistake == "two values":
            return output, lambda losses: loss(losses)[::2]
        if mistake == "all masked":
            return output, lambda losses: (losses.sum() * 0, torch.tensor(0), loss(losses)[2])
        return output, loss

    trainer.step()
    if mistake == "no inputs":
        said = REPORTS[mistake]  # a rank without images is the only one to see it
        if trainer.infra.participating_modules == ["vision"]:
            said = said_by(partial(model, draw(case, 0, 0).tokens, modality_inputs={}))
        trainer.end()
        return said
    before = [parameter.detach().clone() for parameter in model.parameters()]
    coordinator.zero_grad_buffer()
    trainer.schedule(forward_step_func=forward_step)
    said = said_by(trainer.optimizer.step)
    assert all(map(torch.equal, before, model.parameters())) or mistake == "all masked"
    trainer.step()
    trainer.end()
    return said


def _setup_faults() -> dict[str, str]:
    """What is said first, in the documented order, of what the set-up forgets."""
    import vlm
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(FAN_IN)
    shape = Case(modules=FAN_IN).shape()
    model = vlm.build_model(shape, infra.module_to_grid_map, infra.pg_collections)
    model.config.variable_seq_lengths = False
    parallel_state._GLOBAL_MEMORY_BUFFER = None
    get_cuda_rng_tracker().reset()
    said = {
        "before the model": said_by(infra.stage_arguments, "language"),
        "global state": said_by(MultiModuleCoordinator, infra, model),
    }
    infra.initialize_megatron(1)
    infra.stage_arguments("language")
    name = infra.participating_modules[0]
    ddp = vlm.submodules(model)[name]
    if name == "vision":
        model.modality_submodules[name] = ddp.module
    said["no DDP"] = said_by(MultiModuleCoordinator, infra, model)
    if name == "vision":
        model.modality_submodules[name] = ddp
    coordinator = MultiModuleCoordinator(infra, model)
    said["attach"] = said_by(coordinator.attach, model.config)
    said["communicator"] = said_by(coordinator.build_pipeline_communicator, model.config)
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
    "no inputs": "of input_ids its slice and not the whole microbatch",
    "whole input_ids": "module 'vision' has other samples than the language model: 4 on each of DP 2, where a microbatch has 4 in all",
}


@pytest.mark.parametrize("mistake", REPORTS)
def test_mistakes_of_a_forward_step(mistake):
    case = Case(modules=FAN_IN, per_token=PER_TOKEN, ddp=SHARDED)
    for said in world(3).run("test_traps:_wrong_reports", case, mistake):
        assert REPORTS[mistake] in said
        assert bool(said) == bool(REPORTS[mistake])
