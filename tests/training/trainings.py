"""A case as a training that takes steps, saves, loads and evaluates, through the public methods."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import vlm
from attrs import evolve, frozen


@frozen(kw_only=True)
class GatedCase(cases.Case):
    """One whose MLPs are gated: Megatron's checkpoints take their weights apart.

    Args:
        layers_in_first_stage: of a module in stages; as many as the other stages have if left out.
    """

    layers_in_first_stage: int | None = None

    def shape(self) -> Any:
        shape = super().shape()
        return evolve(shape, config={**shape.config, "gated_linear_unit": True})

    def build_model(self, infra: Any) -> Any:
        make = vlm._config

        def config(shape: Any, name: str, sizes: Any, groups: Any) -> Any:
            made = make(shape, name, sizes, groups)
            if groups is not None and groups.pp.size() > 1:
                made.num_layers_in_first_pipeline_stage = self.layers_in_first_stage
            return made

        with cases._replaced(vlm, "_config", config):
            return super().build_model(infra)


@frozen(kw_only=True)
class SizedCase(cases.Case):
    """One with another vocabulary, or other heads, of the language model."""

    vocabulary: int = cases.VOCABULARY
    heads: int = 2

    def shape(self) -> Any:
        shape = super().shape()
        sizes = {"vocabulary": self.vocabulary, "heads": self.heads}
        return evolve(shape, language=evolve(shape.language, **sizes))


@frozen
class Training:
    """What a trainer holds."""

    model: Any
    coordinator: Any
    optimizer: Any
    run: Any
    run_on: Any

    def steps(self, *numbers: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of some steps, each on the data of its number."""
        found = []
        for step in numbers:
            self.coordinator.zero_grad_buffer()
            losses = self.run(step)
            _, norm, _ = self.optimizer.step()
            found.append((self.coordinator.reduce_losses(losses)["loss"], norm))
        return found

    def fingerprint(self) -> list[float]:
        """A number for each parameter of the model."""
        return [float(parameter.detach().double().sum()) for parameter in self.model.parameters()]

    def evaluate(self, step: int) -> float:
        """Loss on a step's data, without taking the step."""
        with self.coordinator.evaluation():
            return self.coordinator.reduce_losses(self.run(step, forward_only=True))["loss"]


@contextmanager
def training(case: cases.Case, **settings: Any) -> Iterator[Training]:
    """The training of a case on this rank; everything is given back at the end."""
    infra, model, coordinator = cases.built(case)
    optimizer = cases.optimizer_of(case, coordinator, **{"clip_grad": 1.0} | settings)
    coordinator.attach(model.config, optimizer)
    communicator = coordinator.build_pipeline_communicator(model.config)

    def run_on(data: Iterator[Any], **options: Any) -> Any:
        return cases.run_schedule(case, model, coordinator, communicator, data, **options)

    def run(step: int, **options: Any) -> Any:
        return run_on(cases._data(case, step), **options)

    try:
        yield Training(model, coordinator, optimizer, run, run_on)
    finally:
        model.destroy()
        infra.destroy()
