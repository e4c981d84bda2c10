"""Estimated costs are what the papers' formulas and arithmetic by hand give."""

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from layouts import parallel

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning import Cluster, ModuleCosts, ModuleSizes
from megatron_mimo_coord.planning.estimates import (
    Accelerator,
    estimated_costs,
    forward_flops,
    scaled,
)

ACCELERATOR = Accelerator(flops_per_second=1e12, memory_bytes_per_second=1e11)
CLUSTER = Cluster(ranks_per_node=8, node_latency_seconds=1e-3, node_bytes_per_second=1e9)
WORDS = ModuleSizes(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=128,
    seq_length=32,
    params_dtype="bf16",
    attention_backend="unfused",
)


def costs(sizes: ModuleSizes, parallelism: ModuleParallelism, **more: Any) -> ModuleCosts:
    return estimated_costs(evolve(sizes, **more), parallelism, 64, ACCELERATOR, CLUSTER)


@given(
    layers=st.integers(1, 96),
    heads=st.sampled_from([4, 16, 64]),
    sequence=st.integers(1, 8192),
    words=st.integers(1, 10) .map(lambda number: 1024 * number),
)  # fmt: skip
def test_a_forward_pass_is_that_of_the_paper(layers, heads, sequence, words):
    # 24 B s l h^2 (1 + s / 6h) + 2 B s h V: a quarter of Narayanan et al. 2021, arXiv 2104.04473, 5.1
    hidden = 64 * heads
    sizes = evolve(
        WORDS, num_layers=layers, hidden_size=hidden, num_attention_heads=heads, vocab_size=words,
        seq_length=sequence, ffn_hidden_size=4 * hidden, num_query_groups=heads, kv_channels=64,
    )  # fmt: skip
    paper = 24 * sequence * layers * hidden**2 * (1 + sequence / (6 * hidden))
    logits = 2 * sequence * hidden * words
    assert forward_flops(sizes, hidden) == pytest.approx(paper + logits)
    causal = evolve(sizes, attention_backend="flash")  # half of the attention is left out
    left_out = 2 * sequence**2 * layers * hidden
    assert forward_flops(causal, hidden) == pytest.approx(paper + logits - left_out)


def test_an_encoder_embeds_patches_and_projects_what_it_merges():
    encoder = ModuleSizes(
        num_layers=1, hidden_size=8, num_attention_heads=1, patch_size=12, tokens_per_image=16,
        output_tokens_per_image=4, projection_hidden_size=10, images_per_sample=3,
    )  # fmt: skip
    before = 2 * 3 * 16 * 12 * 8
    after = 2 * 3 * 4 * (32 * 10 + 10 * 64)  # four tokens of width 8 in one
    layer = 3 * 16 * (2 * (4 * 8 * 8 + 8 * 8 * 8) + 4 * 16 * 8)
    assert forward_flops(encoder, 64) == before + layer + after
    deeper = evolve(encoder, num_layers=3)
    of_layers = [forward_flops(deeper, 64, range(each, each + 1)) for each in range(3)]
    assert of_layers == [before + layer, layer, layer + after]
    assert costs(encoder, parallel()).output_bytes_per_sample == 3 * 4 * 64 * 4  # fp32


LAYERS = 2 * 32 * (2 * 12 * 64**2 + 4 * 32 * 64)
LOGITS = 2 * 32 * 64 * 128
PARAMETERS = 2 * 128 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_seconds_and_bytes_of_one_rank():
    found = costs(WORDS, parallel())
    assert found.forward_seconds_per_sample == pytest.approx((LAYERS + LOGITS) / 1e12)
    assert found.backward_seconds_per_sample == pytest.approx(2 * (LAYERS + LOGITS) / 1e12)
    assert found.activation_bytes_per_sample == 32 * 64 * 2
    assert found.gradient_bytes == 2 * PARAMETERS
    assert costs(WORDS, parallel(), grad_reduce_in_fp32=True).gradient_bytes == 4 * PARAMETERS
    # Adam reads a gradient, reads and writes a master copy and two moments, all in fp32.
    assert found.optimizer_seconds == pytest.approx(PARAMETERS * (1 + 2 * 3) * 4 / 1e11)
    assert (found.frozen, found.recompute) == (False, False)
    assert costs(WORDS, parallel(), frozen=True).frozen


def test_what_is_recomputed_is_paid_for():
    selective = costs(WORDS, parallel(), recompute_granularity="selective")
    attention = 2 * 32 * 4 * 32 * 64
    twice = 2 * (LAYERS + LOGITS) + attention
    assert selective.backward_seconds_per_sample == pytest.approx(twice / 1e12)
    full = costs(WORDS, parallel(), recompute_granularity="full", recompute_method="uniform")
    norms = costs(
        WORDS, parallel(), recompute_granularity="selective", recompute_modules=("layernorm",)
    )
    moved = 2 * 32 * 2 * (1 + 1) * 64 * 2  # layers x tokens x norms x (read + written) x bytes
    assert norms.backward_seconds_per_sample == pytest.approx(
        2 * (LAYERS + LOGITS) / 1e12 + moved / 1e11
    )
    language = full.backward_seconds(parallel(), 0, samples=1, receives=True)
    assert language == pytest.approx(3 * (LAYERS + LOGITS) / 1e12)


def test_stages_share_layers_and_the_last_has_the_logits():
    found = costs(WORDS, parallel(pp=2))
    shares = [found.stage_share(2, stage) * (LAYERS + LOGITS) for stage in range(2)]
    assert shares == pytest.approx([LAYERS / 2, LAYERS / 2 + LOGITS])


def both(costs: ModuleCosts, layout: ModuleParallelism, samples: float = 1) -> float:
    """Seconds of a microbatch, forward and back."""
    backward = costs.backward_seconds(layout, 0, samples, receives=True)
    return costs.forward_seconds(layout, 0, samples) + backward


def test_tensor_parallel_ranks_wait_for_four_sums_a_layer_and_two_of_the_vocabulary():
    found = costs(WORDS, parallel(tp=2))
    # Two norms read and write hidden states, and two residuals read two of them and write one.
    repeated = 2 * (2 + 3) * 2 * 32 * 64 * 2 / 1e11
    alone = (LAYERS + LOGITS) / 1e12
    assert found.tensor_parallel_replicated_share == pytest.approx(repeated / alone)
    computing = 3 * (repeated + (alone - repeated) / 2)
    for samples in (1, 4):  # a sum of more hidden states takes as many bytes more
        one_sum = 2 * (1e-3 + samples * 32 * 64 * 2 / 2 / 1e9)  # a ring of two
        assert both(found, parallel(tp=2), samples) == pytest.approx(
            samples * computing + (4 * 2 + 2) * one_sum
        )
    forward = found.forward_seconds(parallel(tp=2), 0, 4)
    assert forward == pytest.approx(4 * computing / 3 + (2 * 2 + 1) * one_sum)
    assert costs(WORDS, parallel(tp=2), sequence_parallel=True) == evolve(
        found, tensor_parallel_replicated_share=0.0, activation_bytes_per_sample=32 * 64 * 2 / 2
    )


def test_context_parallel_ranks_pass_keys_and_values_around():
    grouped = {"num_query_groups": 2}
    found = costs(WORDS, parallel(tp=2, context_parallel_size=4), **grouped)
    part = 32 / 4 * 2 * 2 * 16 / 2 * 2  # tokens x keys and values x groups x width / TP x bytes
    passing = 2 * 3 * 3 * (1e-3 + part / 1e9)  # layers x others x forward and twice back
    whole = costs(WORDS, parallel(tp=2), **grouped)
    layout = parallel(tp=2, context_parallel_size=4)
    sums = (4 * 2 + 2) * 2 * 1e-3  # whose latency is that of as many tokens
    alone = both(whole, parallel(tp=2)) - sums
    assert both(found, layout) == pytest.approx(sums + alone / 4 + passing)
    assert found.activation_bytes_per_sample == whole.activation_bytes_per_sample


def test_packed_samples_attend_within_themselves():
    flops = {
        lengths: forward_flops(evolve(WORDS, packed_lengths=lengths), 64)
        for lengths in (None, (32,), (16, 16), (20, 8))
    }
    of_a_pair = 2 * 4 * 64  # layers x operations x width
    assert flops[None] == flops[32,]
    assert flops[None] - flops[16, 16] == of_a_pair * (32**2 - 2 * 16**2)
    assert flops[None] - flops[20, 8] == of_a_pair * (32**2 - 20**2 - 8**2)


def test_tokens_go_to_their_experts_and_back():
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_layer_freq": [0, 1]}
    alone = costs(WORDS, parallel(dp=2), **experts)
    shared = costs(WORDS, parallel(dp=2, expert_model_parallel_size=2), **experts)
    sent = 32 * 2 * 64 * 2 / 2  # half of all tokens' copies are for the other rank's experts
    assert alone.waiting_seconds_per_sample == 0
    assert shared.waiting_seconds_per_sample == pytest.approx(2 * 2 * sent / 1e9)
    assert both(shared, parallel(dp=2), 2) - both(alone, parallel(dp=2), 2) == pytest.approx(
        2 * 2 * sent / 1e9
    )


@given(
    ranks=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 3])),
    seconds=st.tuples(st.floats(1e-3, 10), st.sampled_from([0.0, 0.01, 1.0])),
    repeated=st.floats(0, 1),
    samples=st.integers(1, 8),
    latency=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_where_all_is_as_it_was_measured_nothing_changes(
    ranks, seconds, repeated, samples, latency
):
    """Neither of a frozen module, which computes half of a backward, or none."""
    (tp, cp, dp), (forward, backward), is_frozen = ranks, seconds, repeated < 0.5
    measured = ModuleCosts(
        forward_seconds_per_sample=forward, backward_seconds_per_sample=backward,
        measured_tensor_parallel_size=tp, measured_context_parallel_size=cp,
        measured_samples=samples, tensor_parallel_replicated_share=repeated,
        frozen=is_frozen or not backward,
    )  # fmt: skip
    layout = parallel(tp=tp, dp=dp, context_parallel_size=cp)
    found = scaled(measured, WORDS, tp, cp, evolve(CLUSTER, node_latency_seconds=latency))
    as_measured = samples * (forward + backward * (0.5 if is_frozen else 1)) / tp / cp
    took = found.forward_seconds(layout, 0, samples * dp)
    took += found.backward_seconds(layout, 0, samples * dp, receives=backward > 0)
    assert took == pytest.approx(as_measured)
