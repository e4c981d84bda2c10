"""What a layout holds on a rank of each stage: model states, activations in flight, messages."""

from collections.abc import Mapping

from attrs import frozen

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    modules_by_stage,
    pack,
    runs_encoders_first,
    sharing,
    stages_behind,
)
from megatron_mimo_coord.planning.activations import stage_activations
from megatron_mimo_coord.planning.model_states import model_states
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

ASSUMPTIONS = (
    "weights, gradient buffers and optimizer state as Megatron's DDP and Adam allocate them, "
    "padding included; moments and master copies in fp32",
    "activations: the tensors that Megatron's layers save for backward, after Korthikanti et al. "
    "2022 (arXiv 2205.05198), within 2 % of what autograd keeps of small models; experts get equal "
    "numbers of tokens",
    "1F1B: a stage holds its warm-up microbatches and one more; colocated modules hold one; "
    "encoders on ranks of a pipeline hold those of the step, or encoder_microbatches of them",
    "working memory: the gradients of one layer's MLP, one recomputed layer, the logits once more; "
    "with CP, the embeddings of whole sequences",
    "not in it: CUDA context, NCCL's buffers, fragmentation, workspaces, what the optimizer's step "
    "needs for a moment",
)
"""What the estimate rests on, for a user to read."""


PARTS = ("weights", "gradients", "optimizer", "activations", "working", "messages")


@frozen
class StageMemory:
    """Bytes on the fullest rank of a module's pipeline stage.

    Args:
        weights: parameters, or the buffer they lie in.
        gradients: buffers of gradients.
        optimizer: Adam's moments and master copies; a shard with the distributed optimizer.
        activations: what all microbatches in flight leave until their backward.
        working: what is there once, while a layer or the loss is computed.
        messages: what was received over bridges, and outputs that were sent and are still held.
        microbatches: in flight.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    messages: float
    microbatches: int

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return sum(getattr(self, part) for part in PARTS)


def layout_memory(
    modules: Mapping[str, ModuleParallelism],
    sizes: Mapping[str, ModuleSizes],
    *,
    micro_batch_size: int,
    num_microbatches: int,
    encoders_first: bool | None = None,
    encoder_microbatches: int | None = None,
) -> dict[tuple[str, int], StageMemory]:
    """What a rank of each (module, stage) of a layout holds.

    Args:
        modules: parallel sizes of each module; they divide what they share.
        sizes: of each module.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
        encoders_first, encoder_microbatches: as in :func:`simulate_step`.

    Example:
        >>> sizes = ModuleSizes(
        ...     num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128, seq_length=32
        ... )
        >>> layout = {"language": ModuleParallelism(pipeline_model_parallel_size=2)}
        >>> memory = layout_memory(
        ...     layout, {"language": sizes}, micro_batch_size=1, num_microbatches=8
        ... )
        >>> [stage.microbatches for stage in memory.values()], memory["language", 0].weights
        ([2, 1], 240896)
    """
    grids = pack(modules)
    shared = sharing(grids)
    first = runs_encoders_first(grids) if encoders_first is None else encoders_first
    kept = num_microbatches if encoder_microbatches is None else max(1, encoder_microbatches)
    found = {}
    for names, stage in modules_by_stage(grids):
        behind = stages_behind(grids, names[-1], stage)
        for name in names:
            found[name, stage] = stage_memory(
                name,
                sizes,
                modules[name],
                0 if name in shared else stage,
                micro_batch_size=micro_batch_size,
                in_flight=min(num_microbatches, kept if first and name in shared else behind + 1),
                waiting=num_microbatches if first else None,
            )
    return {
        (name, stage): found[name, stage] for name in grids for each, stage in found if each == name
    }


def rank_totals(
    grids: Mapping[str, ModuleGrid], memory: Mapping[tuple[str, int], StageMemory]
) -> dict[tuple[str, int], float]:
    """Bytes on a rank of each (module, stage), with those of the other modules on the same rank."""
    return {
        (name, stage): sum(memory[other, stage].total for other in names)
        for names, stage in modules_by_stage(grids)
        for name in names
    }


def stage_memory(
    name: str,
    sizes: Mapping[str, ModuleSizes],
    parallelism: ModuleParallelism,
    stage: int,
    *,
    micro_batch_size: int,
    in_flight: int,
    waiting: int | None = None,
) -> StageMemory:
    """What a rank of a stage holds with some microbatches in flight.

    Received hidden states of the same module are the first layer's input, and counted there. What a
    stage sent is held unless ``deallocate_pipeline_outputs``; the language model's first stage
    holds the tokens of every encoder beside the sequence that it puts them into, and those of
    ``waiting`` microbatches where encoders run before its pipeline.
    """
    own, language = sizes[name], sizes[LANGUAGE]
    tp, cp, dp, pp = parallelism.shape
    samples = micro_batch_size / dp
    weights, gradients, optimizer = model_states(own, parallelism, stage, language.hidden_size)
    saved, working = stage_activations(own, parallelism, stage, samples)
    if cp > 1 and stage == 0:  # whole, before ranks cut their parts
        working = max(working, hidden_bytes(own, samples))
    received = sent = 0.0
    if name == LANGUAGE and stage == 0:
        encoders = (encoder for other, encoder in sizes.items() if other != LANGUAGE)
        received = sum(encoder_output(each, language, samples) for each in encoders)
    if stage < pp - 1:
        sent = hidden_bytes(own, samples) / (tp if own.sequence_parallel else 1) / cp
    elif name != LANGUAGE and waiting is None:
        sent = encoder_output(own, language, samples)
    if own.deallocate_pipeline_outputs:
        sent = 0.0
    needs_backward = not own.frozen or name == LANGUAGE or stage > 0
    return StageMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=in_flight * saved if needs_backward else 0.0,
        working=working,
        messages=(waiting or in_flight) * received + in_flight * sent,
        microbatches=in_flight,
    )


def hidden_bytes(sizes: ModuleSizes, samples: float) -> float:
    """Bytes of the hidden states of so many samples, at most."""
    return sizes.tokens(samples, at_most=True) * sizes.hidden_size * sizes.bytes_per_number


def encoder_output(encoder: ModuleSizes, language: ModuleSizes, samples: float) -> float:
    """Bytes that an encoder hands to the language model for so many samples, at most."""
    tokens = samples * encoder.max_images_per_sample * encoder.output_tokens
    return tokens * language.hidden_size * encoder.bytes_per_number
