"""A training job whose steps are timed, for predict_and_measure.py: one layout, a small model.

torchrun --nproc-per-node 2 examples/timed_job.py layout.toml
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from job import start_ranks, stop_ranks
from megatron.core.models.mimo import MimoModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from vlm import (
    LANGUAGE,
    EncoderShape,
    LanguageShape,
    ModelShape,
    build_model,
    config_of,
    submodules,
)

from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator, read_layout

VISION, IMAGE, VOCABULARY, PATCH_DIM = "vision", 31, 32, 16
# A layer that sleeps: seconds of a sample forward, as long again twice for backward. Divided by TP.
SLEEP = {VISION: 0.02, LANGUAGE: 0.03}


def main() -> None:
    """Train a few steps; the first rank prints the seconds of the shortest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", type=Path, help="a TOML file")
    parser.add_argument("--compute", action="store_true", help="layers compute, and do not sleep")
    parser.add_argument("--micro-batch-size", type=int, default=4, metavar="N")
    parser.add_argument("--num-microbatches", type=int, default=4, metavar="N")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="that are timed")
    parser.add_argument("--record", type=Path, metavar="FILE", help="the trace of the timed steps")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start_ranks()
    seconds = Job.build(options).time_steps(options.steps, options.record)
    if dist.get_rank() == 0:
        print(seconds)
    stop_ranks()


@frozen
class Job:
    """What a step needs."""

    options: argparse.Namespace
    shape: ModelShape
    infra: MegatronMIMOInfra
    model: MimoModel
    coordinator: MultiModuleCoordinator
    optimizer: Any
    communicator: Any

    @classmethod
    def build(cls, options: argparse.Namespace) -> "Job":
        infra = MegatronMIMOInfra.build(read_layout(options.layout))
        shape = small(256, 64) if options.compute else small(16, 4)
        prepare = (lambda model: None) if options.compute else put_to_sleep
        grids, groups = infra.module_to_grid_map, infra.pg_collections
        infra.initialize_megatron(seed=1)
        model = build_model(shape, grids, groups, prepare=prepare)
        coordinator = MultiModuleCoordinator(infra, model)
        optimizer = coordinator.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3))
        coordinator.attach(model.config, optimizer)
        communicator = coordinator.build_pipeline_communicator(model.config)
        return cls(options, shape, infra, model, coordinator, optimizer, communicator)

    def time_steps(self, steps: int, record: Path | None) -> float:
        """Seconds of the shortest step: what else the machine does only makes a step longer."""
        self._step()
        if record:
            self.coordinator.record_timeline(record, steps=steps)
        seconds = []
        for _ in range(steps):
            dist.barrier()
            start = time.monotonic()
            self._step()
            torch.cuda.synchronize()
            dist.barrier()
            seconds.append(time.monotonic() - start)
        self.model.destroy()
        self.infra.destroy()
        return min(seconds)

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self.coordinator.zero_grad_buffer()
        self.coordinator.forward_backward_func(
            forward_step_func=self._forward,
            data_iterator=self._data(),
            model=[self.model],
            num_microbatches=self.options.num_microbatches,
            seq_length=self.shape.language.sequence,
            micro_batch_size=self.options.micro_batch_size,
            p2p_communicator=self.communicator,
            pg_collection=self.coordinator.schedule_pg_collection,
        )
        self.optimizer.step()

    def _data(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Text tokens [sample, sequence] behind those of one image, and images, of all ranks."""
        samples, patches = self.options.micro_batch_size, self.shape.encoders[VISION].patches
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.options.num_microbatches):
            size = (samples, self.shape.language.sequence)
            tokens = torch.randint(IMAGE, size, generator=generator)
            tokens[:, :patches] = IMAGE
            images = torch.randn((samples, patches, PATCH_DIM), generator=generator)
            yield tokens.to("cuda"), images.to("cuda")

    def _forward(self, data: Iterator[Any], model: MimoModel) -> tuple[Any, Any]:
        tokens, images = next(data)
        here = self.infra.participating_modules
        share = partial(self.coordinator.data_parallel_slice, self.options.micro_batch_size)
        mine = tokens[share(LANGUAGE if LANGUAGE in here else VISION)]
        inputs = {VISION: {"images": images[share(VISION)]}} if VISION in here else None
        losses, _ = model(
            input_ids=mine,
            position_ids=torch.arange(mine.shape[1]).to("cuda").expand_as(mine),
            labels=mine.roll(-1, 1),
            loss_mask=torch.ones_like(mine, dtype=torch.float32),
            modality_inputs=inputs,
        )
        return losses, _mean


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    return losses.mean(), {}


def small(hidden: int, patches: int) -> ModelShape:
    """Four layers each, so that PP may be 1, 2 or 4."""
    sizes = {"layers": 4, "hidden": hidden, "heads": 4}
    encoder = EncoderShape(patches=patches, patch_dim=PATCH_DIM, token_id=IMAGE, **sizes)
    language = LanguageShape(vocabulary=VOCABULARY, sequence=2 * patches, **sizes)
    return ModelShape(encoders={VISION: encoder}, language=language)


# -- layers that take a known time -----------------------------------------------------------------


def put_to_sleep(model: MimoModel) -> None:
    """Have every layer sleep for each sample that it is given."""
    for name, module in submodules(model).items():
        tensor_parallel = config_of(module).tensor_model_parallel_size
        for block in module.modules():
            if isinstance(block, TransformerBlock):
                for layer in block.layers:
                    seconds = SLEEP[name] / tensor_parallel
                    layer.register_forward_hook(partial(_sleep_after, seconds))


def _sleep_after(seconds: float, layer: Any, args: Any, outputs: Sequence[Any]) -> tuple[Any, ...]:
    hidden_SBH, *rest = outputs
    return (_Sleep.apply(hidden_SBH, seconds * hidden_SBH.shape[1]), *rest)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


if __name__ == "__main__":
    main()
