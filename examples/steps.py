"""What benchmark_step.py runs on every rank: a model whose encoder may sleep, data, steps."""

import os
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from benchmark_layouts import AHEAD, ASSIGNED, MEGATRON, NO_IMAGES, SLICES, VISION
from megatron.core.models.mimo import MimoModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from vlm import LANGUAGE, EncoderShape, LanguageShape, ModelShape, build_model

from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism, MultiModuleCoordinator

OF_SAMPLE = 0.01  # seconds that a layer of the language model takes forward, on shared ranks
PATCHES, PATCH_DIM, TEXT = 2, 16, 4
IMAGE, VOCABULARY = 31, 32
SIGMA = {"mild": 0.5, "strong": 1.0, "sorted": 1.0}
MOST = 16  # images of a sample
EVEN = 3  # of each sample without skew


def machine(options: Namespace) -> str:
    """What the figures were measured on."""
    ranks, versions = dist.get_world_size(), f"torch {torch.__version__}"
    where = f"{ranks} CPU ranks over gloo on {os.cpu_count()} cores"
    if dist.get_backend() == "nccl":
        where = f"{ranks} ranks over NCCL, {torch.cuda.get_device_name()}"
    work = f"real encoders of width {options.encoder_hidden}"
    if options.encoder == "sleeping":
        work = f"encoders that sleep {options.milliseconds:g} ms an image, backward twice that"
    return f"{where}, {versions}; {work}"


@frozen
class Microbatch:
    """Samples of all ranks: ``counts`` images each, ``images`` [image, patch, number], ``tokens``.

    Made on the host, as a data loader would; each rank moves what it reads.
    """

    counts: Sequence[int]
    images: torch.Tensor
    tokens: torch.Tensor

    def without_images(self) -> "Microbatch":
        """The same samples, text alone."""
        return Microbatch([0] * len(self.counts), self.images[:0], self.tokens.clamp(max=IMAGE - 1))


def draw(samples: int, number: int, skew: str, seed: int) -> list[Microbatch]:
    """The microbatches of a step, the same on every rank."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        counts = [EVEN] * samples
        if skew in SIGMA:
            counts = [min(MOST, int(dice.lognormvariate(0.6, SIGMA[skew]))) for _ in counts]
        if skew == "sorted":
            counts.sort(reverse=True)
        images = torch.randn((sum(counts), PATCHES, PATCH_DIM), generator=generator, device="cpu")
        shape = samples, MOST * PATCHES + TEXT
        tokens = torch.randint(IMAGE, shape, generator=generator, device="cpu")
        for row, count in zip(tokens, counts, strict=True):
            row[: count * PATCHES] = IMAGE
        found.append(Microbatch(counts, images, tokens))
    return found


class _Sleep(torch.autograd.Function):
    """Takes time and no core, forward and twice as long backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


def fall_asleep(model: MimoModel, seconds: float, of_sample: float, freeze: bool) -> None:
    """Have the encoder on this rank take so long for each image, and layers for each sample."""
    model.modality_submodules.requires_grad_(not freeze)
    for layer in model.language_model.decoder.layers if of_sample and model.language_model else ():
        layer.register_forward_hook(
            lambda layer, _, outputs: (
                _Sleep.apply(outputs[0], of_sample * outputs[0].shape[1]),
                *outputs[1:],
            )
        )
    for name, module in model.modality_submodules.items():
        assert name == VISION
        module.encoders["transformer"].register_forward_hook(
            lambda encoder, images, hidden: (
                _Sleep.apply(hidden, seconds * len(images[0])) if images else hidden
            )
        )


@frozen
class Bench:
    """A model on this rank, and the three ways to take a step with it."""

    infra: MegatronMIMOInfra
    model: MimoModel
    coordinator: MultiModuleCoordinator
    communicators: Mapping[str, MultiModulePipelineCommunicator]
    optimizer: Any
    options: Namespace

    @classmethod
    def build(cls, modules: Mapping[str, ModuleParallelism], options: Namespace) -> "Bench":
        """Grids, model, coordinator, both communicators."""
        infra = MegatronMIMOInfra.build(modules)
        sleeping = options.encoder == "sleeping"
        shape = ModelShape(
            encoders={
                VISION: EncoderShape(
                    patches=PATCHES,
                    patch_dim=PATCH_DIM,
                    token_id=IMAGE,
                    layers=1 if sleeping else 4,
                    hidden=16 if sleeping else options.encoder_hidden,
                )
            },
            language=LanguageShape(
                vocabulary=VOCABULARY,
                sequence=MOST * PATCHES + TEXT,
                layers=2 if options.shared else modules[LANGUAGE].pipeline_model_parallel_size,
                hidden=32,
            ),
            per_token={VISION: True, LANGUAGE: True},
        )
        prepare: Callable[[MimoModel], None] = lambda model: None  # noqa: E731
        if sleeping:
            seconds, of_sample = options.milliseconds / 1e3, OF_SAMPLE * options.shared
            if options.ahead:  # a stage takes as long for a microbatch, forward and backward
                replicas = [modules[name].data_parallel_size for name in (VISION, LANGUAGE)]
                of_sample = seconds * EVEN * replicas[1] / replicas[0] / 3
            prepare = partial(
                fall_asleep, seconds=seconds, of_sample=of_sample, freeze=bool(options.ahead)
            )
        grids, groups = infra.module_to_grid_map, infra.pg_collections
        infra.initialize_megatron(seed=1)
        model = build_model(shape, grids, groups, prepare=prepare)
        coordinator = MultiModuleCoordinator(infra, model)
        optimizer = coordinator.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4))
        coordinator.attach(model.config, optimizer)
        ours = coordinator.build_pipeline_communicator(model.config)
        ways: dict[str, Any] = {NO_IMAGES: ours, SLICES: ours, ASSIGNED: ours, AHEAD: ours}
        if not options.shared:
            ways[MEGATRON] = MultiModulePipelineCommunicator(
                grids,
                infra.topology,
                model.config,
                dim_mapping={"s": 0, "b": 1, "h": 2},
                module_output_ndim=infra.module_output_ndim,
            )
        return cls(infra, model, coordinator, ways, optimizer, options)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            dist.barrier()
            self.model.destroy()
            self.infra.destroy()

    def measure(self, ways: Sequence[str], skew: str) -> dict[str, Any]:
        """Rounds of each way in turns, each round on new data; one before that is not counted.

        Also the seconds that the encoder takes in each round if its ranks share the work evenly.
        """
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        imbalance: dict[str, list[float]] = {SLICES: [], ASSIGNED: []}
        encoder: list[float] = []
        for index in range(-1, self.options.rounds):
            data = draw(
                self.options.micro_batch_size, self.options.microbatches, skew, seed=100 + index
            )
            if index >= 0:
                images = sum(sum(microbatch.counts) for microbatch in data)
                ranks = self.infra.module_to_grid_map[VISION].size
                encoder.append(3e-3 * self.options.milliseconds * images / ranks)
            for turn in range(len(ways)):
                way = ways[(turn + index) % len(ways)]  # each as often after each
                taken, loads = self._step(way, data)
                if index >= 0:
                    seconds[way].append(taken)
                    if way in imbalance:
                        of_ranks = [sum(load) for load in zip(*loads, strict=True)]
                        imbalance[way].append(max(of_ranks) / statistics.mean(of_ranks))
        return {"seconds": seconds, "imbalance": imbalance, "encoder": encoder}

    def _step(self, way: str, data: list[Microbatch]) -> tuple[float, list[Sequence[float]]]:
        """Seconds of the slowest rank, and the loads of the encoder's ranks in each microbatch."""
        if not self.options.ahead:
            return self._timed(way, iter(data), len(data))
        batches = iter(data * 2)
        self._timed(way, batches, len(data), self.options.ahead if way == AHEAD else 0)
        return self._timed(way, batches, len(data))

    def _timed(
        self, way: str, batches: Iterator[Microbatch], number: int, ahead: int = 0
    ) -> tuple[float, list[Sequence[float]]]:
        loads: list[Sequence[float]] = []
        dist.barrier()
        start = time.perf_counter()
        self.coordinator.zero_grad_buffer()
        schedule: Any = self.coordinator.forward_backward_func
        if way == MEGATRON:
            schedule = forward_backward_pipelining_without_interleaving
        elif ahead:
            schedule = partial(schedule, encoder_ahead=ahead)
        schedule(
            forward_step_func=partial(self._forward, way, loads),
            data_iterator=batches,
            model=[self.model],
            num_microbatches=number,
            seq_length=MOST * PATCHES + TEXT,
            micro_batch_size=self.options.micro_batch_size,
            p2p_communicator=self.communicators[way],
            pg_collection=self.coordinator.schedule_pg_collection,
        )
        self.optimizer.step()
        torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, device="cuda")
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item(), loads

    def _forward(
        self, way: str, loads: list[Sequence[float]], data: Iterator[Microbatch], model: MimoModel
    ) -> Any:
        microbatch = next(data)
        if way == NO_IMAGES:
            microbatch = microbatch.without_images()
        counts, samples = microbatch.counts, self.options.micro_batch_size
        here = list(self.coordinator.gradient_scaling_factors)
        read = partial(self.coordinator.data_parallel_slice, samples)
        share = read(here[-1])  # the language model's, if it is here
        starts = [sum(counts[:sample]) for sample in range(samples)]
        tokens_of_images = [[PATCHES] * count for count in counts]
        if way == ASSIGNED:
            assignment = self.coordinator.assign_images(VISION, tokens_of_images)
            loads.append(assignment.loads)
            local = assignment.local
        else:
            dp = self.infra.module_to_grid_map[VISION].size
            each = samples // dp
            loads.append([sum(counts[rank * each : (rank + 1) * each]) for rank in range(dp)])
            local = [(s, i) for s in range(samples)[read(here[0])] for i in range(counts[s])]
        inputs = None
        if here[0] == VISION and local:
            images = microbatch.images[[starts[sample] + image for sample, image in local]]
            inputs = {VISION: {"images": images.to("cuda", non_blocking=True)}}
        tokens = microbatch.tokens[share].to("cuda", non_blocking=True)
        labels, mask = tokens.roll(-1, 1), (tokens != IMAGE).float()
        output, mask = model(
            input_ids=tokens,
            position_ids=torch.arange(tokens.shape[1], device="cuda").expand_as(tokens),
            labels=labels,
            loss_mask=mask,
            modality_inputs=inputs,
        )
        return output, partial(_loss, mask)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, number = (losses * mask).sum(), mask.sum()
    return total, number.int(), {"loss": torch.stack((total.detach(), number))}
