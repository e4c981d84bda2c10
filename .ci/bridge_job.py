"""Trains a small vision-language model in Megatron-Bridge's own loop, on CPU ranks; see `clients`.

    torchrun --nproc-per-node N .ci/bridge_job.py LAYOUT.json LOSSES.json CHECKPOINTS [JOB...]

One process trains it several times, each from the same weights on the same data: each of the `JOBS`
with Bridge's own functions and with a coordinator. Rank 0 writes the losses.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "examples")]

import ranks  # noqa: E402
import vlm  # noqa: E402
import weights  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules  # noqa: E402
from megatron.core.models.vision.multimodal_projector import MultimodalProjector  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402

import megatron_mimo_coord.megatron_bridge as coordinated  # noqa: E402
from megatron_mimo_coord.cpu import enable_cpu_ranks  # noqa: E402
from megatron_mimo_coord.megatron.bridge_groups import destroy_bridge_groups  # noqa: E402

STEPS, MICROBATCHES, MICRO_BATCH_SIZE = 4, 2, 4
VOCABULARY, SEQUENCE, PATCHES, PATCH_DIM, HIDDEN = 16, 20, 4, 3, 16
ENCODERS = {"vision": VOCABULARY - 1, "audio": VOCABULARY - 2}
"""The token that stands for what each encodes."""

Layout = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Args:
        per_token: whether the modules' configs say ``calculate_per_token_loss``.
        one_flag: whether the language model's alone does.
        sharded: the optimizer; one that is not leaves gradients where Bridge's loop, which zeroes
            through the DDPs alone, has backward add to them once more, if there is no coordinator.
        overlap_param_gather: of the DDPs.
        bf16: of the model.
        sgd: not Adam, of which Megatron resumes only Apex's and Transformer Engine's.
        frozen: the encoders; their projections train.
        images: of each sample of a microbatch.
        evaluated: after every second step.
        stopped_by: who saves and resumes it after the second step, "Bridge" or "coordinator"; the
            latter saves on the first layout, for all.
    """

    per_token: bool = True
    one_flag: bool = False
    sharded: bool = True
    overlap_param_gather: bool = False
    bf16: bool = False
    sgd: bool = False
    frozen: bool = False
    images: tuple[int, ...] = (1, 1, 1, 1)
    evaluated: bool = False
    stopped_by: str = ""


JOBS = {
    "loss per token": Job(),
    "mean loss": Job(per_token=False),
    "the language model's loss alone per token": Job(one_flag=True),
    "optimizer not sharded": Job(sharded=False),
    "weights gathered while forward runs": Job(overlap_param_gather=True),
    "bf16": Job(bf16=True),
    "frozen encoders": Job(frozen=True),
    "samples without images": Job(images=(2, 0, 0, 2)),
    "evaluation": Job(evaluated=True),
    "plain SGD": Job(sgd=True, sharded=False),
    "saved and resumed by Bridge": Job(sgd=True, sharded=False, stopped_by="Bridge"),
    "saved on the first layout, resumed on each": Job(stopped_by="coordinator"),
}


def name_what_needs_a_gpu() -> None:
    """Modules without wheels for a CPU, by name: Bridge imports them, and nothing here calls them.

    Megatron's own modules come first: they would take the names for the real thing.
    """
    import megatron.training.models  # noqa: F401

    classes = ("Linear", "LayerNormLinear", "GroupedLinear")
    ops = SimpleNamespace(Sequential=type("Sequential", (), {}))
    for name, names in {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"ops": ops} | {each: type(each, (), {}) for each in classes},
        "nvidia_resiliency_ext": {},
        "nvidia_resiliency_ext.inprocess": {"CallWrapper": type("CallWrapper", (), {})},
    }.items():
        module = ModuleType(name)
        vars(module).update(names, __path__=[])
        sys.modules[name] = module
        parent, _, child = name.partition(".")
        if child:
            setattr(sys.modules[parent], child, module)


class Encoder(vlm.Encoder):
    """The examples' encoder, under the name by which Bridge hands out process groups."""

    def __init__(
        self, config: TransformerConfig, shape: vlm.EncoderShape, pg_collection: Any
    ) -> None:
        super().__init__(config, shape, pg_collection)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[image, patch, number] to [image, patch, hidden]."""
        return super().forward(images).transpose(0, 1)


def provider(layout: Layout, job: Job) -> Any:
    """Bridge's provider of the model."""
    from megatron.bridge.models.megatron_mimo import MegatronMIMOProvider
    from megatron.bridge.models.megatron_mimo.megatron_mimo_config import (
        MegatronMIMOParallelismConfig,
        ModuleParallelismConfig,
    )

    dtype = torch.bfloat16 if job.bf16 else torch.float32
    tokens = {name: token for name, token in ENCODERS.items() if name in layout}

    def config(name: str) -> TransformerConfig:
        sizes = layout[name]
        return TransformerConfig(
            num_layers=2,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            tensor_model_parallel_size=sizes.get("tensor_model_parallel_size", 1),
            pipeline_model_parallel_size=sizes.get("pipeline_model_parallel_size", 1),
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=job.bf16,
            calculate_per_token_loss=job.per_token and (name == "language" or not job.one_flag),
            hidden_dropout=0.0,
            attention_dropout=0.0,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
        )

    def submodules(name: str) -> ModuleSpec:
        shape = vlm.EncoderShape(
            patches=PATCHES, patch_dim=PATCH_DIM, token_id=tokens[name], hidden=HIDDEN, heads=2
        )
        encoder = ModuleSpec(Encoder, {"config": config(name), "shape": shape})
        projector: dict[str, Any] = {"projector_type": "mlp", "input_size": HIDDEN}
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        projection = ModuleSpec(
            MultimodalProjector, {"config": config(name), "submodules": layers} | projector
        )
        parts = {"encoders": {"transformer": encoder}, "input_projections": [projection]}
        return ModuleSpec(VisionModalitySubmodules, {}, parts)

    made = MegatronMIMOProvider(
        language_model_spec=ModuleSpec(
            GPTModel,
            {
                "config": config("language"),
                "transformer_layer_spec": get_gpt_layer_local_spec(),
                "vocab_size": VOCABULARY,
                "max_sequence_length": SEQUENCE,
            },
        ),
        modality_submodules_spec={name: submodules(name) for name in tokens},
        special_token_ids=tokens,
        megatron_mimo_parallelism_config=MegatronMIMOParallelismConfig(
            {name: ModuleParallelismConfig(**sizes) for name, sizes in layout.items()}
        ),
        freeze_modality_encoders=dict.fromkeys(tokens, job.frozen),
        bf16=job.bf16,
    )
    made.seq_length = SEQUENCE  # for which Bridge's evaluation asks it, and for this:
    made.moe_expert_rank_capacity_factor = None

    def draw(models: list[Any]) -> None:
        for model in models:
            weights.draw(model, made.build_infra().pg_collections)

    made.register_pre_wrap_hook(draw)
    return made


def batch(encoders: list[str], job: Job, number: int) -> dict[str, Any]:
    """A microbatch of all ranks, of which two in three text tokens count."""
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(0, VOCABULARY - 2, (MICRO_BATCH_SIZE, SEQUENCE), generator=generator)
    for index, name in enumerate(encoders):
        for sample, number_here in enumerate(job.images):
            first = index * PATCHES * max(job.images)
            text[sample, first : first + number_here * PATCHES] = ENCODERS[name]
    counts = torch.rand(text.shape, generator=generator) < 0.67
    images = torch.randn(sum(job.images), PATCHES, PATCH_DIM, generator=generator)
    return {
        "input_ids": text,
        "labels": text.roll(-1, 1),
        "loss_mask": (counts & (text < VOCABULARY - 2)).float(),
        "position_ids": torch.arange(SEQUENCE).expand_as(text),
        "attention_mask": None,
        "modality_inputs": {name: {"transformer": {"images": images}} for name in encoders},
    }


def container(model: Any, job: Job, folder: Path, steps: int) -> Any:
    """Bridge's configuration of the whole job, which ends after some steps."""
    from megatron.bridge.training import config as bridge

    checkpoints = str(folder) if job.stopped_by == "Bridge" else None
    return bridge.ConfigContainer(
        train=bridge.TrainingConfig(
            train_iters=STEPS,
            exit_interval=steps,
            eval_interval=2,
            micro_batch_size=MICRO_BATCH_SIZE,
            global_batch_size=MICRO_BATCH_SIZE * MICROBATCHES,
        ),
        validation=bridge.ValidationConfig(
            eval_iters=1,
            eval_global_batch_size=MICRO_BATCH_SIZE * MICROBATCHES,
            eval_micro_batch_size=MICRO_BATCH_SIZE,
        ),
        model=model,
        optimizer=bridge.OptimizerConfig(
            optimizer="sgd" if job.sgd else "adam",
            lr=0.1,
            min_lr=0.1,
            adam_eps=1.0,
            sgd_momentum=0.0,
            weight_decay=0.0,
            bf16=job.bf16,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=job.sharded,
            overlap_grad_reduce=True,
            overlap_param_gather=job.overlap_param_gather,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", start_weight_decay=0.0, end_weight_decay=0.0
        ),
        dataset=SimpleNamespace(seq_length=SEQUENCE, dataloader_type="single"),
        dist=bridge.DistributedInitConfig(use_decentralized_pg=True),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=bridge.CheckpointConfig(
            save=checkpoints,
            load=checkpoints,
            save_interval=steps,
            save_optim=False,
            load_optim=False,
            async_save=False,
        ),
    )


class Training:
    """A job in Bridge's own loop.

    Args:
        layout: sizes of each module, by Bridge's names.
        job: what is trained.
        folder: of its checkpoints.
        timeline: have the coordinator record all steps but the last there.
    """

    def __init__(self, layout: Layout, job: Job, folder: Path, timeline: Path | None) -> None:
        self.layout, self.job, self.folder, self.timeline = layout, job, folder, timeline
        self.sums = torch.zeros(STEPS + 1, 2)  # loss and tokens of each step, and of evaluations
        self.groups: dict[str, Any] = {}
        self.done = 0

    def losses(self) -> list[float]:
        """Of each step that was taken, and of evaluations; the same on every rank."""
        if self.job.stopped_by and not self.folder.exists():
            self.run(STEPS // 2)
        self.run(STEPS)
        dist.all_reduce(self.sums)
        return [float(loss / count) for loss, count in self.sums if count]

    def run(self, steps: int) -> None:
        """Bridge's own loop, until after a step."""
        from megatron.bridge.training import setup_megatron_mimo as setup
        from megatron.bridge.training.pretrain_megatron_mimo import pretrain_megatron_mimo

        output, optimizers = setup.MegatronMIMOSetupOutput, []

        def load(**made: Any) -> Any:
            """What Bridge's set-up hands out, after our checkpoint was loaded."""
            found = output(**made)
            optimizers.append(found.optimizer)
            if self.job.stopped_by == "coordinator":
                self.done, _ = coordinated.coordinator().load_checkpoint(
                    self.folder, found.optimizer
                )
                found.global_state.train_state.step = self.done
            return found

        setup.MegatronMIMOSetupOutput = load
        try:
            model = provider(self.layout, self.job)
            pretrain_megatron_mimo(
                container(model, self.job, self.folder, steps), self.step, self.iterators
            )
        finally:
            setup.MegatronMIMOSetupOutput = output
        if self.job.stopped_by == "coordinator" and steps < STEPS:
            coordinated.coordinator().save_checkpoint(self.folder, optimizers[0], step=steps)

    def iterators(self, cfg: Any, infra: Any, train_state: Any = None) -> Any:
        """Of microbatches to train on, and to evaluate with."""
        self.groups = infra.pg_collections
        self.done = train_state.step if train_state else 0
        if self.timeline:
            coordinated.coordinator().record_timeline(self.timeline, steps=STEPS - 1)
        evaluation = self.batches(lambda: 100) if self.job.evaluated else None
        return self.batches(lambda: self.done), evaluation

    def batches(self, first: Callable[[], int]) -> Iterator[dict[str, Any]]:
        """Microbatches from a step on."""
        encoders = [name for name in ENCODERS if name in self.layout]
        for number in count(first() * MICROBATCHES):
            yield batch(encoders, self.job, number)

    def step(self, state: Any, data_iterator: Any, model: Any) -> Any:
        """Bridge's forward step, which also adds up what it lost."""
        from megatron.bridge.training.megatron_mimo_step import forward_step

        output, loss_func = forward_step(state, data_iterator, model)
        if loss_func is None:
            return output, None
        place = state.train_state.step if model.training else STEPS

        def counted(output: torch.Tensor) -> Any:
            loss, num_tokens, metrics = loss_func(output)
            if dist.get_rank(self.groups["language"].tp) == 0:
                self.sums[place] += metrics["lm loss"]
            return loss, num_tokens, metrics

        return output, counted


def check(timeline: Path, world_size: int) -> None:
    """Each rank has stepped its optimizer once in each step that was recorded."""
    spans = [span["name"] for span in json.loads(timeline.read_text())["traceEvents"]]
    assert spans.count("optimizer") == world_size * (STEPS - 1), spans


def main() -> None:
    """Train each way, and have rank 0 write the losses."""
    given, written, checkpoints, *names = sys.argv[1:]
    layout = json.loads(Path(given).read_text())
    enable_cpu_ranks()
    name_what_needs_a_gpu()
    ranks.share_one_gloo_device()
    store, rank, world_size = next(dist.rendezvous("env://"))
    number = count()

    def losses_of(*args: Any) -> list[float]:
        """Of a training with groups of its own: Bridge makes hundreds, and destroys none."""
        prefixed = dist.PrefixStore(f"training {next(number)}", store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size)
        found = Training(*args).losses()
        coordinated.disable()
        destroy_bridge_groups()
        dist.destroy_process_group()
        gc.collect()
        return found

    dp = {name: sizes["data_parallel_size"] for name, sizes in layout.items()}
    is_fan_in = max(dp.values()) > dp["language"]
    losses: dict[str, dict[str, list[float]]] = {"Bridge": {}, "coordinator": {}}
    for name in names or JOBS:
        job = JOBS[name]
        if not job.stopped_by and not (is_fan_in and len(set(job.images)) > 1):  # Bridge refuses
            losses["Bridge"][name] = losses_of(layout, job, Path(), None)
        timeline = Path(written).with_suffix(".trace.json") if name == "loss per token" else None
        folder = Path(written).with_suffix(".bridge")
        if job.stopped_by == "coordinator":
            folder = Path(checkpoints)
        coordinated.enable()
        losses["coordinator"][name] = losses_of(layout, job, folder, timeline)
        if rank == 0 and timeline:
            check(timeline, world_size)
    if rank == 0:
        Path(written).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
