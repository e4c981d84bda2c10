"""One training job as a value: its layout, data and settings, and how to run it on real ranks.

``Case`` prints as the expression that makes it, so that a failure can be pasted into a test. Each
rank runs the case twice: as a trainer would, through the coordinator and Megatron's own schedule;
and alone, with plain autograd on the whole model and the whole batch. That oracle knows nothing of
this package, of DDP or of schedules. Weights and data are drawn by name and by number, so both see
the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import accumulate, cycle
from typing import Any

import torch
import torch.distributed as dist
import vlm
import weights
from attrs import evolve, field, frozen
from context_attention import ContextAttention, positions
from megatron.core.models.mimo import MimoModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_mimo_coord import (
    MegatronMIMOInfra,
    ModuleParallelism,
    MultiModuleCoordinator,
)
from megatron_mimo_coord.checks import job
from megatron_mimo_coord.gradients import num_tokens
from megatron_mimo_coord.layout import pack, ranks_taken, runs_encoders_first
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp

TOLERANCE = 1e-5
VOCABULARY = 16
PATCHES, PATCH_DIM = 2, 3
# With a large eps the update is smooth in the gradient: rounding errors stay as small as they are.
ADAM = {"lr": 0.1, "eps": 1.0}


@frozen(kw_only=True)
class Case:
    """A training job.

    Args:
        modules: parallel sizes of each module.
        images: for each encoder, images of each sample: [step][microbatch][sample]. A list that is
            too short is repeated.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
        steps: optimizer steps.
        per_token: ``calculate_per_token_loss`` of each module.
        unmasked: share of text tokens that count.
        ddp: settings of every module's DDP.
        frozen: parameters whose name in the whole model starts with one of these are frozen,
        trainable: but for those that have one of these in their name.
        lengths: text tokens of each sample that may count, in turn; the rest is padding. All of
            them if left out; none for an empty sample.
        packed: a rank's samples lie in one row, without the padding.
        nan_step: the step whose first image holds a NaN; none if -1.
        force_all_reduce: passed to the schedule.
        wrap: where ``Float16Module`` goes: "", "model" or "submodules"; bf16 if anywhere.
        loss_scale: of fp16, whose optimizer then updates the fp32 weights.
        zeroed_by_ddp: zero gradients through the DDPs, and never through optimizer or coordinator.
        second_coordinator: build another coordinator on the same model after the first step.
        layers: of the language model; as many as encoders have if 0.
        is_thin: whether modules have one layer for each stage, and not two.
        tied_embeddings, experts: of the language model.
        no_optimizer: do not build Megatron's optimizer; one step only.
        megatron_communicator: build the communicator without the coordinator.
        assign: assign images in every microbatch (1), in every second one (2), or never (0).
        tiles: encoder images that make up an image that is assigned, in turn; one each where the
            next does not fit into the sample.
        assign_ahead: call ``assign_images`` for a whole step before its schedule.
        evaluate: run the schedule forward_only, on the next step's data, before each step.
        encoders_first: run encoders before the language model's schedule, where that is a choice.
        encoder_microbatches: of how many microbatches the encoders' activations are kept.
        seed: of the data.
        rehearse: whether to, in a world that does. It takes as long again, and shows nothing where
            another case launches the same.
    """

    modules: Mapping[str, ModuleParallelism]
    images: Mapping[str, tuple[tuple[tuple[int, ...], ...], ...]] = field(factory=dict)
    micro_batch_size: int = 4
    num_microbatches: int = 2
    steps: int = 1
    per_token: Mapping[str, bool] = field(factory=dict)
    unmasked: float = 0.7
    ddp: Mapping[str, Any] = field(factory=dict)
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    packed: bool = False
    nan_step: int = -1
    force_all_reduce: bool = False
    wrap: str = ""
    loss_scale: float = 1.0
    zeroed_by_ddp: bool = False
    second_coordinator: bool = False
    layers: int = 0
    is_thin: bool = False
    tied_embeddings: bool = False
    experts: int | None = None
    no_optimizer: bool = False
    megatron_communicator: bool = False
    assign: int = 0
    tiles: tuple[int, ...] = ()
    assign_ahead: bool = False
    evaluate: bool = False
    encoders_first: bool = False
    encoder_microbatches: int | None = None
    seed: int = 0
    rehearse: bool = True

    @property
    def encoders(self) -> list[str]:
        return [name for name in self.modules if name != vlm.LANGUAGE]

    @property
    def world_size(self) -> int:
        return ranks_taken(pack(self.modules).values())

    def is_frozen(self, whole_name: str) -> bool:
        """Whether a parameter of the whole model is."""
        kept = any(part in whole_name for part in self.trainable)
        return bool(self.frozen) and whole_name.startswith(self.frozen) and not kept

    def build_model(self, infra: MegatronMIMOInfra) -> MimoModel:
        """The model on this rank, each module in its DDP."""
        prepare = partial(_prepare, self, infra.pg_collections)
        return weights.build_model(self.shape(), infra, prepare=prepare)

    def build_whole_model(self) -> MimoModel:
        """All of it on this rank, for the oracle."""
        groups = dict.fromkeys(self.modules, alone())
        model = vlm.build_bare_model(self.shape(), groups)
        weights.draw(model, groups)
        return model

    def encoder_inputs(self, images: torch.Tensor) -> dict[str, Any] | None:
        """What an encoder is given."""
        return {"images": images} if len(images) else None

    def positions_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position ids of texts [sample, token]."""
        return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def counts(self, name: str, step: int, microbatch: int) -> list[int]:
        """Images of each sample of a microbatch."""
        steps = self.images.get(name, (((1,),),))
        microbatches = steps[step % len(steps)]
        samples = microbatches[microbatch % len(microbatches)]
        return [samples[sample % len(samples)] for sample in range(self.micro_batch_size)]

    @property
    def sequence(self) -> int:
        """Tokens of a sample: the most image tokens it can have, and six of text."""
        most = 0
        for name in self.encoders:
            steps = self.images.get(name, (((1,),),))
            most += max(max(samples) for step in steps for samples in step)
        return self.padded(most * PATCHES + 6)

    def padded(self, length: int) -> int:
        """A length that context-parallel ranks can share."""
        language = self.modules[vlm.LANGUAGE]
        parts = 2 * language.context_parallel_size * language.tensor_model_parallel_size
        return length + (-length) % (parts if self.shares_sequences else 1)

    @property
    def shares_sequences(self) -> bool:
        """Whether the language model has context parallelism."""
        return self.modules[vlm.LANGUAGE].context_parallel_size > 1

    def layers_of(self, name: str) -> int:
        """Of a module."""
        return self.modules[name].pipeline_model_parallel_size if self.is_thin else 2

    def shape(self) -> vlm.ModelShape:
        """The model; its configs differ between modules where the case says so."""
        config: dict[str, Any] = {}
        if self.wrap:
            config |= {"bf16": True, "params_dtype": torch.bfloat16}
            config |= {"pipeline_dtype": torch.bfloat16}
        return vlm.ModelShape(
            encoders={
                name: vlm.EncoderShape(
                    patches=PATCHES,
                    patch_dim=PATCH_DIM,
                    token_id=VOCABULARY - 1 - index,
                    hidden=8,
                    heads=2,
                    layers=self.layers_of(name),
                )
                for index, name in enumerate(self.encoders)
            },
            language=vlm.LanguageShape(
                vocabulary=VOCABULARY,
                sequence=self.sequence,
                hidden=16,
                heads=2,
                layers=self.layers or self.layers_of(vlm.LANGUAGE),
                tied_embeddings=self.tied_embeddings,
                experts=self.experts,
                attention=ContextAttention if self.packed else None,
            ),
            per_token=self.per_token,
            ddp={name: self._ddp_of(name) for name in self.modules},
            config=config,
        )

    def _ddp_of(self, name: str) -> dict[str, Any]:
        settings = dict(self.ddp)
        if self.per_token.get(name):
            settings.pop("average_in_collective", None)  # Megatron forbids the two together
        return settings


@frozen
class Microbatch:
    """All samples of a microbatch."""

    index: int
    tokens: torch.Tensor
    mask: torch.Tensor
    images: dict[str, torch.Tensor]
    counts: dict[str, list[int]]
    lengths: list[int]
    assignments: Mapping[str, ImageAssignment] | None = None

    def images_of(self, name: str, samples: slice) -> torch.Tensor:
        """The images of a slice of the samples: [image, patch, number]."""
        before = sum(self.counts[name][: samples.start])
        return self.images[name][before : before + sum(self.counts[name][samples])]


def draw(case: Case, step: int, microbatch: int) -> Microbatch:
    """The same data on every rank."""
    with not_rehearsed():
        return _draw(case, step, microbatch)


def _draw(case: Case, step: int, microbatch: int) -> Microbatch:
    generator = torch.Generator().manual_seed(1000 * case.seed + 10 * step + microbatch)
    text = VOCABULARY - len(case.encoders)
    tokens = torch.randint(text, (case.micro_batch_size, case.sequence), generator=generator)
    mask = torch.rand(tokens.shape, generator=generator) < case.unmasked
    counts = {name: case.counts(name, step, microbatch) for name in case.encoders}
    lengths = [case.sequence] * case.micro_batch_size
    for sample in range(case.micro_batch_size):
        place = 0
        for index, name in enumerate(case.encoders):
            number = counts[name][sample] * PATCHES
            tokens[sample, place : place + number] = VOCABULARY - 1 - index
            place += number
        mask[sample, :place] = False
        if case.lengths:
            end = place + case.lengths[sample % len(case.lengths)]
            tokens[sample, end:], mask[sample, end:] = 0, False
            lengths[sample] = case.padded(end)
    images = {
        name: torch.randn((sum(counts[name]), PATCHES, PATCH_DIM), generator=generator)
        for name in case.encoders
    }
    if step == case.nan_step and microbatch == 0:
        for drawn in images.values():
            drawn[:1, :1, :1] = torch.nan
    images = {name: drawn.cuda() for name, drawn in images.items()}
    return Microbatch(microbatch, tokens.cuda(), mask.float().cuda(), images, counts, lengths)


def _norm(config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """Megatron's own norm without Transformer Engine refuses sequence parallelism."""
    norm = getattr(torch.nn, config.normalization)(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


WrappedTorchNorm.__new__ = lambda cls, *args, **kwargs: _norm(*args, **kwargs)


# -- as a trainer does it --------------------------------------------------------------------------


def _nothing(*_: Any) -> None:
    """Called at a point of a training where nobody wants to look."""


def train(
    case: Case,
    built: Callable[[Any, MimoModel], None] = _nothing,
    updated: Callable[[Any, MimoModel], None] = _nothing,
    folder: str = "",
) -> Iterator[tuple[Any, MimoModel, dict[str, float]]]:
    """Run the case through the coordinator; yields after each step's finalize, before the update.

    Args:
        case: the job.
        built: called with the infra and the model before the first step.
        updated: called with them after each update, when the weights are gathered.
        folder: of checkpoints, from the last of which it goes on, and where it leaves one.

    Yields:
        (infra, model, reduced losses).
    """
    infra = MegatronMIMOInfra.build(case.modules)
    wrapped = model = case.build_model(infra)
    if case.wrap == "model":
        model.pg_collection = infra.pg_collections[infra.participating_modules[0]]
        wrapped = Float16Module(model.config, model)
    coordinator = MultiModuleCoordinator(infra, wrapped)
    optimizer = None
    if not case.no_optimizer:
        optimizer = optimizer_of(case, coordinator)
        for group in optimizer.param_groups:
            group["foreach"] = True  # few operators, of which a rehearsal sees each
    coordinator.attach(model.config, optimizer)
    if case.megatron_communicator:
        communicator = megatrons_communicator(infra, model.config)
    else:
        communicator = coordinator.build_pipeline_communicator(model.config)
    first = coordinator.load_checkpoint(folder, optimizer).step if folder else 0
    built(infra, model)
    try:
        for step in range(first, case.steps):
            if case.evaluate:
                run_schedule(
                    case,
                    wrapped,
                    coordinator,
                    communicator,
                    _data(case, step + 1),
                    forward_only=True,
                )
            if case.zeroed_by_ddp:
                for ddp, _ in coordinator.module_to_grid_tuples:
                    ddp.zero_grad_buffer()
            else:
                coordinator.zero_grad_buffer()
            losses = run_schedule(case, wrapped, coordinator, communicator, _data(case, step))
            yield infra, model, coordinator.reduce_losses(losses)
            if optimizer is not None:
                optimizer.step()
                if updated is not _nothing:
                    with coordinator.evaluation():  # which gathers the weights
                        updated(infra, model)
            if case.second_coordinator and step == 0:
                coordinator = MultiModuleCoordinator(infra, wrapped)
                coordinator.attach(model.config, optimizer)
                if not case.megatron_communicator:
                    communicator = coordinator.build_pipeline_communicator(model.config)
        if folder:
            coordinator.save_checkpoint(folder, optimizer, step=case.steps)
    finally:
        model.destroy()
        infra.destroy()


def optimizer_of(
    case: Case, coordinator: MultiModuleCoordinator, overrides: Any = None, **settings: Any
) -> Any:
    """Megatron's optimizer of a case's model."""
    config = {
        "optimizer": "adam",
        "lr": ADAM["lr"],
        "adam_eps": ADAM["eps"],
        "weight_decay": 0.0,
        "clip_grad": 0.0,
        "bf16": bool(case.wrap),
        "fp16": case.loss_scale != 1,
        "loss_scale": case.loss_scale if case.loss_scale != 1 else None,
        "use_distributed_optimizer": bool(case.ddp.get("use_distributed_optimizer")),
    }
    return coordinator.build_optimizer(OptimizerConfig(**config | settings), overrides)


def megatrons_communicator(infra: Any, config: Any) -> MultiModulePipelineCommunicator:
    """Megatron's own, as a trainer without a coordinator makes it."""
    return MultiModulePipelineCommunicator(
        infra.module_to_grid_map,
        infra.topology,
        config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim=infra.module_output_ndim,
    )


def run_schedule(
    case: Case,
    model: Any,
    coordinator: MultiModuleCoordinator,
    communicator: Any,
    data: Iterator[Microbatch],
    forward_only: bool = False,
) -> Any:
    """Megatron's own schedule on the microbatches of a step; what it returns."""
    if case.assign_ahead:
        data = iter([evolve(m, assignments=_assign(case, coordinator, m)) for m in data])
    schedule: Any = forward_backward_pipelining_without_interleaving
    if case.encoders_first or runs_encoders_first(pack(case.modules)):
        schedule = partial(
            coordinator.forward_backward_func,
            encoders_first=case.encoders_first,
            encoder_microbatches=case.encoder_microbatches,
        )
    return schedule(
        forward_step_func=partial(_forward_step, case, coordinator),
        data_iterator=data,
        model=[model],
        num_microbatches=case.num_microbatches,
        seq_length=case.sequence,
        micro_batch_size=case.micro_batch_size,
        p2p_communicator=communicator,
        pg_collection=coordinator.schedule_pg_collection,
        forward_only=forward_only,
        force_all_reduce=case.force_all_reduce,
    )


def built(case: Case) -> Any:
    """(infra, model, coordinator) of a case on this rank."""
    infra = MegatronMIMOInfra.build(case.modules)
    model = case.build_model(infra)
    return infra, model, MultiModuleCoordinator(infra, model)


def _data(case: Case, step: int) -> Iterator[Microbatch]:
    return iter([draw(case, step, index) for index in range(case.num_microbatches)])


def _prepare(case: Case, groups: vlm.Groups, model: MimoModel) -> None:
    """Freeze what the case freezes; put ``Float16Module`` where it belongs."""
    for name, module in vlm.submodules(model).items():
        for whole_name, parameter, _ in weights.named_shards(name, module, groups[name]):
            parameter.requires_grad = not case.is_frozen(whole_name)
        if case.wrap:
            module.bfloat16()
        if case.wrap == "submodules":
            float16 = Float16Module(vlm.config_of(module), module)
            if name == vlm.LANGUAGE:
                model.language_model = float16
            else:
                model.modality_submodules[name] = float16


def _forward_step(
    case: Case, coordinator: MultiModuleCoordinator, data: Iterator[Microbatch], model: Any
) -> Any:
    microbatch = next(data)
    here = list(coordinator.gradient_scaling_factors)
    size = case.micro_batch_size
    readers = [vlm.LANGUAGE] if vlm.LANGUAGE in here else here
    slices = [coordinator.data_parallel_slice(size, name) for name in readers]
    samples = max(slices, key=lambda samples: samples.stop - samples.start)
    assignments = microbatch.assignments
    if assignments is None:
        assignments = _assign(case, coordinator, microbatch)
    inputs = {}
    for name in filter(here.__contains__, case.encoders):
        images = _images(case, coordinator, microbatch, name, assignments.get(name))
        inputs[name] = case.encoder_inputs(images)
    tokens = microbatch.tokens[samples]
    text = {
        "input_ids": tokens,
        "position_ids": case.positions_of(tokens),
        "labels": tokens.roll(-1, 1),
        "loss_mask": microbatch.mask[samples],
    }
    if case.packed:
        text = _packed(text, microbatch.lengths[samples])
    output, mask = model(**text, modality_inputs=inputs)
    return output, partial(_loss, mask)


def _packed(text: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """Samples [..., sample, token] of these lengths as one row, [..., 1, token]."""
    rows = {
        name: torch.cat(
            [row[..., :end] for row, end in zip(each.unbind(-2), lengths, strict=True)], -1
        ).unsqueeze(-2)
        for name, each in text.items()
    }
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).cuda()
    packing: dict[str, Any] = {}
    for side in "q", "kv":
        packing |= {f"cu_seqlens_{side}": bounds, f"cu_seqlens_{side}_padded": bounds}
        packing[f"max_seqlen_{side}"] = max(lengths)
    return rows | {"packing_kwargs": packing}


def _assign(
    case: Case, coordinator: MultiModuleCoordinator, microbatch: Microbatch
) -> Mapping[str, ImageAssignment]:
    """Assignments of a microbatch, if the case has any for it.

    The language model's ranks call it too: they check that their samples are the encoder's.
    """
    if not case.assign or microbatch.index % case.assign:
        return {}
    assignments = {}
    for name, counts in microbatch.counts.items():
        tokens = [[PATCHES * tiles for tiles in _tiles(case, count)] for count in counts]
        costs = [[1 + (s + image) % 3 for image in range(len(t))] for s, t in enumerate(tokens)]
        ids = range(len(counts))
        assignments[name] = coordinator.assign_images(name, tokens, costs=costs, sample_ids=ids)
    return assignments


def _tiles(case: Case, count: int) -> list[int]:
    """Encoder images of each image of a sample that has ``count`` of them."""
    tiles: list[int] = []
    for number in cycle(case.tiles or (1,)):
        if sum(tiles) + number > count:
            return tiles + [1] * (count - sum(tiles))
        tiles.append(number)
    return tiles


def _images(
    case: Case,
    coordinator: MultiModuleCoordinator,
    microbatch: Microbatch,
    name: str,
    assignment: ImageAssignment | None,
) -> torch.Tensor:
    """What an encoder on this rank is fed."""
    if assignment is None:
        samples = coordinator.data_parallel_slice(case.micro_batch_size, name)
        return microbatch.images_of(name, samples)
    first = list(accumulate(microbatch.counts[name], initial=0))
    mine = []
    for sample, image in assignment.local:
        *before, here = [tokens // PATCHES for tokens in assignment.tokens[sample][: image + 1]]
        start = first[sample] + sum(before)
        mine += range(start, start + here)
    return microbatch.images[name][mine]


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, number = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, number, {"loss": torch.stack((total.detach(), number.float()))}


# -- the oracle: one process, plain autograd -------------------------------------------------------

_alone: list[ProcessGroupCollection] = []


def alone() -> ProcessGroupCollection:
    """Groups of this rank only, for a whole model in one process."""
    if not _alone:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        names = [
            "tp",
            "cp",
            "dp",
            "pp",
            "tp_cp",
            "dp_cp",
            "mp",
            "ep",
            "expt_tp",
            "expt_dp",
            "tp_ep",
            "tp_ep_pp",
            "tp_dp_cp",
        ]
        _alone.append(ProcessGroupCollection(**dict.fromkeys(names, groups[dist.get_rank()])))
    return _alone[0]


@cache
def _hosts() -> Any:
    """A group of all ranks that is no part of the job."""
    return dist.new_group(backend="gloo")


class Oracle:
    """The whole model in one process: the first rank computes, and tells the others its gradients.

    The weights are there alone.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.is_finite = True  # whether all gradients are
        alone()  # which all ranks make
        here = self._build() if dist.get_rank() == 0 else {}
        said = [{name: (*each.shape,) for name, each in here.items()}]
        dist.broadcast_object_list(said, 0, group=_hosts())
        dtype = torch.bfloat16 if case.wrap else torch.float32
        self.parameters = here or {
            name: torch.nn.Parameter(torch.zeros(shape, dtype=dtype), not case.is_frozen(name))
            for name, shape in said[0].items()
        }
        self.optimizer = torch.optim.Adam(self.parameters.values(), foreach=True, **ADAM)

    def backward(self, step: int) -> float:
        """Gradient of the one loss of a step, by its definition; returns the loss."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trained = [each for each in self.parameters.values() if each.requires_grad]
        sizes = [1, *(each.numel() for each in trained)]
        said = torch.empty(sum(sizes))
        if dist.get_rank() == 0:
            loss = torch.tensor([self._backward(step)])
            torch.cat([loss, *(each.grad.flatten().float() for each in trained)], out=said)
        dist.broadcast(said, 0, group=_hosts())
        self.is_finite = bool(said[1:].isfinite().all())
        loss, *parts = said.split(sizes)
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return float(loss)

    def _build(self) -> dict[str, torch.nn.Parameter]:
        """The model, and its parameters by their names in the whole model."""
        model_parallel_cuda_manual_seed(weights.SEED, tp_rank=0, ep_rank=0, etp_rank=0)
        self.model = self.case.build_whole_model()
        if self.case.wrap:
            self.model.bfloat16()
        parameters = {}
        for name, module in vlm.submodules(self.model).items():
            for whole_name, parameter, _ in weights.named_shards(name, module, alone()):
                parameters[whole_name] = parameter
                parameter.requires_grad = not self.case.is_frozen(whole_name)
        return parameters

    def _backward(self, step: int) -> float:
        case = self.case
        replicas = case.modules[vlm.LANGUAGE].data_parallel_size
        cp = case.modules[vlm.LANGUAGE].context_parallel_size
        share = case.micro_batch_size // replicas
        total = number = torch.zeros(())
        mean = torch.zeros(())
        for index in range(case.num_microbatches):
            microbatch = draw(case, step, index)
            tokens = microbatch.tokens
            losses, _ = self.model(
                input_ids=tokens,
                position_ids=case.positions_of(tokens),
                labels=tokens.roll(-1, 1),
                modality_inputs={
                    name: case.encoder_inputs(images) for name, images in microbatch.images.items()
                },
            )
            losses = losses.float() * microbatch.mask
            total, number = total + losses.sum(), number + microbatch.mask.sum()
            for replica in range(replicas):
                samples = slice(replica * share, (replica + 1) * share)
                for rank in range(cp):
                    here = positions(case.sequence, rank, cp)
                    tokens_here = microbatch.mask[samples][:, here].sum().clamp(min=1)
                    mean = mean + losses[samples][:, here].sum() / tokens_here
        mean = mean / (case.num_microbatches * replicas * cp)
        loss = total / number.clamp(min=1) if case.per_token.get(vlm.LANGUAGE) else mean
        loss.backward()
        return float(total.detach() / number.clamp(min=1))

    def update(self) -> None:
        """One step of plain Adam, unless a gradient is not finite."""
        if self.is_finite and dist.get_rank() == 0:
            with torch._C.DisableTorchFunction():
                self.optimizer.step()


# -- one against the other -------------------------------------------------------------------------


# The oracle is no part of the job, and takes half the time.
not_rehearsed = torch._C._DisableTorchDispatch


def check(case: Case, tolerance: float = TOLERANCE) -> int:
    """Run a case both ways on this rank; returns how many parameters were compared.

    Raises:
        AssertionError: a gradient, or the reported loss, differs; names the step and parameter.
    """
    case = evolve(case, is_thin=True)  # what is between modules takes no more layers
    with nullcontext() if case.rehearse else not_rehearsed():
        return _check(case, tolerance)


def _check(case: Case, tolerance: float) -> int:
    with not_rehearsed():
        oracle = Oracle(case)
    compared = 0
    for step, (infra, model, metrics) in enumerate(train(case)):
        with not_rehearsed():
            expected = oracle.backward(step)
        compared += compare_step(infra, model, metrics, expected, oracle, step, tolerance)
        with not_rehearsed():
            oracle.update()
    return compared


def compare_step(
    infra: Any,
    model: MimoModel,
    metrics: dict[str, float],
    expected: float,
    oracle: Oracle,
    step: int,
    tolerance: float = TOLERANCE,
) -> int:
    """The reported loss and every gradient; returns how many parameters were compared."""
    if not oracle.is_finite:
        return 0
    if not oracle.case.wrap:
        assert abs(metrics["loss"] - expected) <= 1e-5 * max(1, expected), (
            f"step {step}: reported {metrics}, expected {expected}"
        )
    return sum(
        _compare(name, module, infra.pg_collections[name], oracle, step, tolerance)
        for name, module in vlm.submodules(model).items()
    )


def _compare(
    name: str, ddp: Any, groups: ProcessGroupCollection, oracle: Oracle, step: int, tolerance: float
) -> int:
    bare = ddp
    while hasattr(bare, "module"):
        bare = bare.module
    compared = 0
    with not_rehearsed():
        expected = {
            whole_name: torch.zeros_like(each) if each.grad is None else each.grad
            for whole_name, each in oracle.parameters.items()
            if whole_name.startswith(f"{name}.")
        }
        scale = torch.stack([grad.float().norm() for grad in expected.values()]).max()
    for whole_name, parameter, shard in weights.named_shards(name, bare, groups):
        if not parameter.requires_grad:
            assert not hasattr(parameter, "main_grad"), f"{whole_name} is frozen"
            continue
        mine = reduced_part(ddp, parameter, oracle.case.force_all_reduce)
        got = parameter.main_grad.float().flatten()[mine] / oracle.case.loss_scale
        with not_rehearsed(), torch._C.DisableTorchFunction():
            want = shard.of(expected[whole_name]).float().flatten()[mine]
            error = (got - want).norm()
            bound = tolerance * torch.maximum(want.norm(), 1e-2 * scale)
        assert error <= bound, (
            f"step {step}, {whole_name}: error {error:.3g} > {bound:.3g}; "
            f"got norm {got.norm():.6g}, want {want.norm():.6g}, "
            f"ratio {(got @ want) / (want @ want):.6g}"
        )
        compared += got.numel() > 0
    return compared


def reduced_part(ddp: Any, parameter: torch.nn.Parameter, force_all_reduce: bool) -> slice:
    """Which elements of a parameter's gradient this rank gets reduced."""
    if force_all_reduce or not ddp.ddp_config.use_distributed_optimizer:
        return slice(None)
    group = ddp.param_to_bucket_group[parameter]
    bucket = group.param_to_bucket[parameter]
    start, end = bucket.param_to_index[parameter]
    size = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
    low = size * group.intra_distributed_optimizer_instance_rank
    return slice(max(low - start, 0), max(min(low + size, end) - start, 0))


# -- broken on purpose -----------------------------------------------------------------------------


def is_caught(case: Case, mutant: str) -> bool:
    """Whether the check of a case fails on this rank when a term of the formula is broken."""
    with MUTANTS[mutant]():
        try:
            check(evolve(case, rehearse=False))
        except AssertionError:
            return True
    return False


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _bucket_factor(after: Any) -> Any:
    """A mutant of the factor that each bucket of a module gets."""
    original = ModuleDdp.scale_in_reduction

    def broken(self: ModuleDdp, factor: float, changes: Changes) -> None:
        original(self, factor, changes)
        for group in self.groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = after(bucket.gradient_scaling_factor, self, factor)

    return _replaced(ModuleDdp, "scale_in_reduction", broken)


def _formula(**wrong: Any) -> Any:
    """A mutant of c_m itself."""
    original = job.gradient_scaling_factor

    def broken(replicas: int, language_replicas: int, *, ddp_sums: bool, per_token: bool) -> float:
        values = {"replicas": replicas, "language_replicas": language_replicas}
        values |= {"ddp_sums": ddp_sums, "per_token": per_token}
        return original(**values | {key: change(values) for key, change in wrong.items()})

    return _replaced(job, "gradient_scaling_factor", broken)


def _uncounted(self: Any, num_tokens: torch.Tensor | None) -> Any:
    if num_tokens is None:
        return None
    self._sum.copy_(num_tokens)
    return dist.all_reduce(self._sum.clone(), async_op=True)


MUTANTS = {
    "none": nullcontext,
    "DDP keeps its own factor": lambda: _bucket_factor(lambda f, ddp, c: f / c),
    "the factor is applied twice": lambda: _bucket_factor(lambda f, ddp, c: f * c),
    "nothing is divided by": lambda: _bucket_factor(lambda f, ddp, c: 1.0),
    "the language model's flag for all": lambda: _formula(ddp_sums=lambda v: v["per_token"]),
    "no flag is read": lambda: _formula(ddp_sums=lambda v: False),
    "the module's replicas are ignored": lambda: _formula(replicas=lambda v: 1),
    "the language replicas are ignored": lambda: _formula(language_replicas=lambda v: 1),
    "tokens are not summed": lambda: _replaced(num_tokens.NumTokens, "start", _uncounted),
    "every rank's tokens are summed": lambda: _replaced(
        num_tokens, "holds_a_distinct_count", num_tokens.ModuleGrid.is_on_last_stage
    ),
}
