"""Trains a small vision-language model in Megatron-Bridge's own loop, on CPU ranks; see `clients`.

    torchrun --nproc-per-node N .ci/bridge_job.py LAYOUT.json LOSSES.json

One process trains it several times, each from the same weights on the same data: with Bridge's own
functions, twice with a coordinator, and so with another loss. Rank 0 writes the losses.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "examples")]

import vlm  # noqa: E402
import weights  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402

import megatron_mimo_coord.megatron_bridge as coordinated  # noqa: E402
from megatron_mimo_coord.cpu import enable_cpu_ranks  # noqa: E402

STEPS, MICROBATCHES, MICRO_BATCH_SIZE = 4, 2, 4
VOCABULARY, IMAGE_TOKEN, SEQUENCE, PATCHES, PATCH_DIM, HIDDEN = 16, 15, 12, 4, 3, 16


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


class Projection(torch.nn.Linear):
    """A projection that each rank holds whole: Bridge hands it a group for tensor parallelism."""

    def __init__(self, width: int, tp_group: Any) -> None:
        super().__init__(width, width)


def provider(layout: dict[str, dict[str, int]], per_token: dict[str, bool]) -> Any:
    """Bridge's provider of the model."""
    from megatron.bridge.models.megatron_mimo import MegatronMIMOProvider
    from megatron.bridge.models.megatron_mimo.megatron_mimo_config import (
        MegatronMIMOParallelismConfig,
        ModuleParallelismConfig,
    )

    def config(name: str) -> TransformerConfig:
        sizes = layout[name]
        return TransformerConfig(
            num_layers=2,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            tensor_model_parallel_size=sizes.get("tensor_model_parallel_size", 1),
            pipeline_model_parallel_size=sizes.get("pipeline_model_parallel_size", 1),
            pipeline_dtype=torch.float32,
            calculate_per_token_loss=per_token[name],
            hidden_dropout=0.0,
            attention_dropout=0.0,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
        )

    shape = vlm.EncoderShape(
        patches=PATCHES, patch_dim=PATCH_DIM, token_id=IMAGE_TOKEN, hidden=HIDDEN, heads=2
    )
    encoder = ModuleSpec(Encoder, {"config": config("vision"), "shape": shape})
    projection = ModuleSpec(Projection, {"width": HIDDEN})
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
        modality_submodules_spec={
            "vision": ModuleSpec(
                VisionModalitySubmodules,
                {},
                {"encoders": {"transformer": encoder}, "input_projections": [projection]},
            )
        },
        special_token_ids={"vision": IMAGE_TOKEN},
        megatron_mimo_parallelism_config=MegatronMIMOParallelismConfig(
            {name: ModuleParallelismConfig(**sizes) for name, sizes in layout.items()}
        ),
        bf16=False,
    )

    def draw(models: list[Any]) -> None:
        for model in models:
            weights.draw(model, made.build_infra().pg_collections)

    made.register_pre_wrap_hook(draw)
    return made


def batches() -> Iterator[dict[str, Any]]:
    """Microbatches of all ranks: an image in each sample, and text of which two in three count."""
    generator = torch.Generator().manual_seed(7)
    while True:
        text = torch.randint(0, IMAGE_TOKEN, (MICRO_BATCH_SIZE, SEQUENCE), generator=generator)
        text[:, :PATCHES] = IMAGE_TOKEN
        counts = torch.rand(text.shape, generator=generator) < 0.67
        images = torch.randn(MICRO_BATCH_SIZE, PATCHES, PATCH_DIM, generator=generator)
        yield {
            "input_ids": text,
            "labels": text.roll(-1, 1),
            "loss_mask": (counts & (text != IMAGE_TOKEN)).float(),
            "position_ids": torch.arange(SEQUENCE).expand_as(text),
            "attention_mask": None,
            "modality_inputs": {"vision": {"transformer": {"images": images}}},
        }


def container(model: Any, sharded: bool) -> Any:
    """Bridge's configuration of the whole job, its optimizer sharded or not."""
    from megatron.bridge.training import config as bridge

    return bridge.ConfigContainer(
        train=bridge.TrainingConfig(
            train_iters=STEPS,
            micro_batch_size=MICRO_BATCH_SIZE,
            global_batch_size=MICRO_BATCH_SIZE * MICROBATCHES,
        ),
        model=model,
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=0.1, min_lr=0.1, adam_eps=1.0, bf16=False, weight_decay=0.0
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=sharded, overlap_grad_reduce=True
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", start_weight_decay=0.0, end_weight_decay=0.0
        ),
        dataset=SimpleNamespace(seq_length=SEQUENCE),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=bridge.CheckpointConfig(save=None, load=None),
    )


def train(
    layout: dict[str, dict[str, int]],
    per_token: dict[str, bool],
    sharded: bool = True,
    timeline: Path | None = None,
) -> list[float]:
    """Bridge's own loop; the loss of each step, the same on every rank.

    Args:
        layout: sizes of each module, by Bridge's names.
        per_token: ``calculate_per_token_loss`` of each module.
        sharded: the optimizer; one that is not leaves gradients where Bridge's loop, which zeroes
            through the DDPs alone, has backward add to them once more, if there is no coordinator.
        timeline: have the coordinator record all steps but the last there.
    """
    from megatron.bridge.training.megatron_mimo_step import forward_step
    from megatron.bridge.training.pretrain_megatron_mimo import pretrain_megatron_mimo

    sums = torch.zeros(STEPS, 2)

    def step(state: Any, data_iterator: Any, model: Any) -> Any:
        output, loss_func = forward_step(state, data_iterator, model)
        if loss_func is None:
            return output, None

        def counted(output: torch.Tensor) -> Any:
            loss, num_tokens, metrics = loss_func(output)
            if dist.get_rank(groups["language"].tp) == 0:
                sums[state.train_state.step] += metrics["lm loss"]
            return loss, num_tokens, metrics

        return output, counted

    groups: dict[str, Any] = {}

    def build_data_iterators(cfg: Any, infra: Any) -> Any:
        groups.update(infra.pg_collections)
        if timeline:
            coordinated.coordinator().record_timeline(timeline, steps=STEPS - 1)
        return batches(), None

    job = container(provider(layout, per_token), sharded)
    pretrain_megatron_mimo(job, step, build_data_iterators)
    dist.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1]).tolist()


def check(timeline: Path) -> None:
    """Each rank has stepped its optimizer once in each step that was recorded."""
    spans = [span["name"] for span in json.loads(timeline.read_text())["traceEvents"]]
    assert spans.count("optimizer") == dist.get_world_size() * (STEPS - 1), spans
    timeline.unlink()


def main() -> None:
    """Train each way, and have rank 0 write the losses."""
    layout = json.loads(Path(sys.argv[1]).read_text())
    enable_cpu_ranks()
    name_what_needs_a_gpu()
    dist.init_process_group("gloo")
    written, timeline = Path(sys.argv[2]), Path(sys.argv[2]).with_suffix(".trace.json")
    losses = {}
    for loss, flags in {
        "per token": {"vision": True, "language": True},
        "mean": {"vision": False, "language": False},
    }.items():
        losses[f"Bridge, {loss}"] = train(layout, flags)
        coordinated.enable()
        losses[f"coordinator, {loss}"] = train(layout, flags)
        losses[f"coordinator, not sharded, {loss}"] = train(layout, flags, False, timeline)
        coordinated.disable()
        if dist.get_rank() == 0:
            check(timeline)
    one_flag = {"vision": False, "language": True}  # Bridge leaves the encoder 1/DP of its gradient
    losses["Bridge, one flag alone"] = train(layout, one_flag)
    coordinated.enable()
    losses["coordinator, one flag alone"] = train(layout, one_flag)
    if dist.get_rank() == 0:
        written.write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
