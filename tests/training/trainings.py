"""A case as a training that takes steps, saves, loads and evaluates, through the public methods."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cases
from attrs import frozen
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)


@frozen
class Training:
    """What a trainer holds."""

    case: cases.Case
    model: Any
    coordinator: Any
    optimizer: Any
    schedule: Any

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of some steps."""
        found = []
        for step in range(first, last):
            self.coordinator.zero_grad_buffer()
            losses = self.schedule(data_iterator=cases._data(self.case, step))
            _, norm, _ = self.optimizer.step()
            found.append((self.coordinator.reduce_losses(losses)["loss"], norm))
        return found

    def evaluate(self, step: int) -> float:
        """Loss of a step's data, without taking the step."""
        with self.coordinator.evaluation():
            losses = self.schedule(data_iterator=cases._data(self.case, step), forward_only=True)
            return self.coordinator.reduce_losses(losses)["loss"]


@contextmanager
def training(case: cases.Case, **settings: Any) -> Iterator[Training]:
    """The training of a case on this rank; everything is given back at the end."""
    infra, model, coordinator = cases.built(case)
    config = {"optimizer": "adam", "lr": 0.05, "adam_eps": 1.0, "clip_grad": 1.0}
    config |= {"use_distributed_optimizer": bool(case.ddp.get("use_distributed_optimizer"))}
    config |= {"bf16": bool(case.wrap), **settings}
    optimizer = coordinator.build_optimizer(OptimizerConfig(**config))
    coordinator.attach(model.config, optimizer)
    schedule = partial(
        forward_backward_pipelining_without_interleaving,
        forward_step_func=partial(cases._forward_step, case, coordinator),
        model=[model],
        num_microbatches=case.num_microbatches,
        seq_length=case.sequence,
        micro_batch_size=case.micro_batch_size,
        p2p_communicator=coordinator.build_pipeline_communicator(model.config),
        pg_collection=coordinator.schedule_pg_collection,
    )
    try:
        yield Training(case, model, coordinator, optimizer, schedule)
    finally:
        model.destroy()
        infra.destroy()
