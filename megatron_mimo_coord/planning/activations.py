"""Bytes of activations that a microbatch leaves on a rank until its backward.

The terms are those of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4, written out tensor by tensor, so that they hold
for grouped queries, gated and plain MLPs, experts and other widths than the paper's. For its own
transformer in 16 bits they add up to its s b h (34 + 5 a s / h) a layer, to
s b h (10 + 24 / t + 5 a s / (h t)) with tensor parallelism, and to 1 / t of the first with sequence
parallelism.

Measured against what autograd keeps of a ``GPTModel`` (4 layers, hidden 128, on gloo ranks, 15
cases: 16 bits, gated, experts, TP, EP, recomputation, an encoder), the error is -1.7 % to 0 %; what
is left out are statistics of norms, masks and rotary angles, which do not grow with the batch or
the width. ``python -m pytest tests/planning/test_activations.py -s`` prints each. Kernels that keep
copies of their own, as unfused ones in 16 bits do, are not in it.
"""

from collections.abc import Mapping
from functools import cache

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import Shards, shards_of, stage_layers

MASK = 1  # bytes a number of a dropout mask
ROUTING = 40  # bytes a token and expert: its place in the order of experts, twice, and its weight
TARGETS = 17  # bytes a token: target, masked target and mask of the cross entropy

NORM, QKV_INPUT, QKV, CORE, PROJECTION_INPUT = "norm", "qkv input", "qkv", "core_attn", "proj input"
MASKS, MLP_INPUT, MLP, ROUTED, ACTIVATED = "masks", "MLP input", "MLP", "routed", "activated"

DROPPED: Mapping[str, tuple[str, ...]] = {
    "core_attn": (CORE,),
    "layernorm": (QKV_INPUT, MLP_INPUT),
    "mlp": (MLP, ACTIVATED),
    "moe": (ROUTED, MLP, ACTIVATED),
    "moe_act": (ACTIVATED,),
}
"""What a layer does not keep for each of ``recompute_modules``."""


def stage_activations(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, samples: float
) -> tuple[float, float]:
    """Bytes on a rank of a pipeline stage: (saved, working).

    Saved is what each microbatch leaves until its backward, working what is there once, while one
    layer or the loss is computed.

    Args:
        sizes: of the module.
        parallelism: how it is laid out.
        stage: of the module's pipeline, from 0.
        samples: of the microbatch, on this rank.

    Example:
        >>> sizes = ModuleSizes(
        ...     num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=128, seq_length=32,
        ...     hidden_dropout=0, attention_dropout=0, attention_backend="unfused",
        ... )
        >>> stage_activations(sizes, ModuleParallelism(), 0, samples=2)[0]
        362560.0
    """
    tokens = sizes.tokens(samples, at_most=True) / parallelism.context_parallel_size
    layers = stage_layers(sizes, parallelism)[stage]
    saved, working = _of_a_token(sizes, shards_of(parallelism), layers)
    return tokens * saved, tokens * working


@cache
def _of_a_token(sizes: ModuleSizes, shards: Shards, layers: range) -> tuple[float, float]:
    """(saved, working) of a stage with some layers, whatever the replicas."""
    tp, expert_tp, _ = shards
    kept = [layer_bytes(sizes, tp, expert_tp, layer) for layer in layers]
    saved, working = _recomputed(sizes, tp, kept)
    if layers.start == 0:
        saved += _embedding(sizes, tp)
    if layers.stop == sizes.num_layers:
        output, loss = _output(sizes, tp)
        saved, working = saved + output, max(working, loss)
    return saved, working


def layer_bytes(sizes: ModuleSizes, tp: int, expert_tp: int, layer: int) -> dict[str, float]:
    """What a layer saves of each token on a rank, in bytes, by where it is needed.

    Example:
        >>> sizes = ModuleSizes(num_layers=1, hidden_size=64, num_attention_heads=4)
        >>> layer_bytes(sizes, tp=1, expert_tp=1, layer=0)["norm"]
        512.0
    """
    width = sizes.bytes_per_number
    whole = _between_layers(sizes, tp)
    masks = 2 * MASK * whole if sizes.hidden_dropout else 0.0
    norms = 2 * width * whole
    if sizes.qk_layernorm:
        norms += width * (sizes.query_size + sizes.key_size) / tp
    # Unfused attention copies keys and values to heads.
    keys = sizes.key_size if sizes.has_flash_attention else sizes.query_size
    attention = {
        NORM: norms,
        QKV_INPUT: width * whole,
        QKV: width * (sizes.query_size + 2 * keys) / tp,
        CORE: _core_attention(sizes) / tp,
        PROJECTION_INPUT: width * sizes.query_size / tp,
        MASKS: masks,
        MLP_INPUT: width * whole,
    }
    if sizes.has_experts(layer):
        return {**attention, **_mixture(sizes, tp, expert_tp, whole)}
    hidden, activated = _mlp(sizes, sizes.ffn_hidden_size / tp)
    return {**attention, MLP: hidden, ACTIVATED: activated}


def _between_layers(sizes: ModuleSizes, tp: int) -> float:
    """Numbers of a token on a rank between the tensor-parallel parts of a layer."""
    return sizes.hidden_size / (tp if sizes.sequence_parallel else 1)


def _core_attention(sizes: ModuleSizes) -> float:
    """Attention weights of a token for all heads; flash attention keeps one number a head."""
    heads = sizes.num_attention_heads
    if sizes.has_flash_attention:
        return 4 * heads
    width = sizes.bytes_per_number
    weights = width
    if width < 4 and not sizes.masked_softmax_fusion:
        weights += 4  # the softmax is in fp32, and cast
    if sizes.attention_dropout:
        weights += MASK + width
    return weights * heads * sizes.sequence


def _mlp(sizes: ModuleSizes, width: float) -> tuple[float, float]:
    """(what the first layer puts out, what the activation function and the gate do) of a token."""
    number = sizes.bytes_per_number
    outputs = sizes.fc1_outputs * number * width
    unfused_gate = sizes.gated_linear_unit and not sizes.bias_activation_fusion
    return outputs, number * width * (3 if unfused_gate else 1)


def _mixture(sizes: ModuleSizes, tp: int, expert_tp: int, whole: float) -> dict[str, float]:
    """A token goes to ``moe_router_topk`` experts, all of them equally often.

    Ranks that share an expert by tensor parallelism gather each other's tokens.
    """
    number = sizes.bytes_per_number
    tokens = whole / sizes.hidden_size * sizes.moe_router_topk
    gathered = tokens * expert_tp
    expert_width = sizes.moe_ffn_hidden_size / expert_tp
    hidden, activated = _mlp(sizes, expert_width)
    if not sizes.bias_activation_fusion:
        activated += number * expert_width  # before it is weighted by the router
    routed = gathered * number * sizes.hidden_size + tokens * ROUTING
    kept = {ROUTED: routed, MLP: gathered * hidden, ACTIVATED: gathered * activated}
    if sizes.moe_shared_expert_intermediate_size:
        shared = _mlp(sizes, sizes.moe_shared_expert_intermediate_size / tp)
        kept[MLP] += shared[0]
        kept[ACTIVATED] += shared[1]
    return kept


def _recomputed(sizes: ModuleSizes, tp: int, layers: list[dict[str, float]]) -> tuple[float, float]:
    """(what stays, what comes back while one layer is recomputed) of a stage, for a token."""
    full = [sum(layer.values()) for layer in layers]
    backward = max(layer[MLP] + layer[ACTIVATED] for layer in layers)  # gradients of one layer
    if not sizes.recomputed:
        return sum(full), backward
    if sizes.recompute_granularity == "selective":
        dropped = {part for module in sizes.recompute_modules for part in DROPPED[module]}
        back = [sum(layer.get(part, 0.0) for part in dropped) for layer in layers]
        return sum(full) - sum(back), backward + max(back)
    inputs = sizes.bytes_per_number * _between_layers(sizes, tp)
    length = sizes.recompute_num_layers or 1
    if sizes.recompute_method == "block":
        return inputs * min(length, len(layers)) + sum(full[length:]), backward + max(full)
    chunks = [sum(full[start : start + length]) for start in range(0, len(full), length)]
    return inputs * len(chunks), backward + max(chunks)


def _embedding(sizes: ModuleSizes, tp: int) -> float:
    """What a token leaves before the first layer."""
    if not sizes.is_language:
        return sizes.bytes_per_number * (sizes.patch_size or 0)
    masks = MASK * _between_layers(sizes, tp) if sizes.hidden_dropout else 0.0
    return 16 + masks  # its number and its position


def _output(sizes: ModuleSizes, tp: int) -> tuple[float, float]:
    """(what a token leaves behind the last layer, what the loss needs besides)."""
    width = sizes.bytes_per_number
    norm = width * _between_layers(sizes, tp)
    if sizes.vocab_size is not None:
        words = sizes.vocab_size / tp
        return 2 * norm + 4 * words + TARGETS, width * words
    merged = sizes.merged_size * sizes.output_tokens / sizes.sequence
    hidden = 2 * (sizes.projection_hidden_size or 0) * sizes.output_tokens / sizes.sequence
    return norm + width * (merged + hidden), 0.0
