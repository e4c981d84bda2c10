"""Activations: the paper's formula, and what autograd keeps of real models on real ranks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import parallel
from ranks import world

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.activations import layer_bytes, stage_activations
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

# -- the paper -------------------------------------------------------------------------------------


@given(
    heads=st.sampled_from([8, 16, 64]),
    head=st.sampled_from([64, 128]),
    sequence=st.integers(1, 8192),
    tp=st.sampled_from([1, 2, 4, 8]),
    sequence_parallel=st.booleans(),
    selective=st.booleans(),
)
def test_the_formula_is_the_papers(heads, head, sequence, tp, sequence_parallel, selective):
    """Korthikanti et al. 2022, table 2: bytes of a layer for one token."""
    a, s, t, h = heads, sequence, tp, heads * head
    sizes = ModuleSizes(
        num_layers=1,
        hidden_size=h,
        num_attention_heads=a,
        vocab_size=128,
        seq_length=s,
        params_dtype="fp16",
        attention_backend="unfused",
        masked_softmax_fusion=True,
        sequence_parallel=sequence_parallel,
        recompute_granularity="selective" if selective else None,
    )
    attention = 0 if selective else 5 * a * s / h
    expected = h * (10 + 24 / t + attention / t)
    if sequence_parallel:
        expected = h / t * (34 + attention)
    layer = ModuleParallelism(tensor_model_parallel_size=t)
    kept = layer_bytes(sizes, t, t, 0)
    if selective:
        del kept["core_attn"]
    assert sum(kept.values()) == pytest.approx(expected)
    two = stage_activations(ModuleSizes(**as_given(sizes, num_layers=2)), layer, 0, samples=1)
    one = stage_activations(sizes, layer, 0, samples=1)
    assert two[0] - one[0] == pytest.approx(s * expected)


def as_given(sizes: ModuleSizes, **changes: Any) -> dict[str, Any]:
    from attrs import asdict

    return {**asdict(sizes), **changes}


# -- real models -----------------------------------------------------------------------------------

SMALL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,  # a mask has a byte a number on a GPU, but that of a float here
    "attention_dropout": 0.0,
    "attention_backend": "unfused",
}
GATED = {"gated_linear_unit": True, "num_query_groups": 2, "position_embedding_type": "rope"}
MIXTURE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 96, "add_bias_linear": False}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PARALLEL = {"sequence_parallel": True}
CASES: dict[str, tuple[ModuleParallelism, dict[str, Any]]] = {
    "plain": (parallel(), {}),
    "bf16": (parallel(), {"params_dtype": "bf16"}),
    "grouped queries, gated": (parallel(), {**GATED, "add_bias_linear": False}),
    "query norms": (parallel(), {"qk_layernorm": True, "kv_channels": 64}),
    "experts": (parallel(), MIXTURE),
    "shared expert, gated": (
        parallel(),
        {**MIXTURE, **GATED, "moe_shared_expert_intermediate_size": 64, "moe_layer_freq": 2},
    ),
    "TP": (parallel(tp=2), GATED),
    "TP, sequence parallel": (parallel(tp=2), PARALLEL),
    "EP": (parallel(dp=2, expert_model_parallel_size=2), MIXTURE),
    "expert TP": (parallel(tp=2, expert_tensor_parallel_size=2), {**MIXTURE, **PARALLEL}),
    "full, uniform": (parallel(), {**FULL, "recompute_method": "uniform"}),
    "full, block": (parallel(), {**FULL, "recompute_method": "block"}),
    "core attention": (parallel(), {"recompute_granularity": "selective"}),
    "MLP": (parallel(), {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
}
WORST = 0.02
"""Largest relative error over all cases; experts get unequal numbers of tokens."""


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_autograd_keeps(case):
    parallelism, given = CASES[case]
    language = ModuleSizes(**{**SMALL, "vocab_size": 128, "seq_length": 32, **given})
    modules, sizes = {LANGUAGE: parallelism}, {LANGUAGE: language}
    found = world(parallelism.size).run("megatron_memory:saved", modules, sizes, 4)
    kept = sum(each[LANGUAGE] for each in found) / len(found)
    expected = stage_activations(language, parallelism, 0, samples=4)[0]
    print(f"\n{case}: saved {kept}, formula {expected}, error {expected / kept - 1:+.2%}")
    assert expected == pytest.approx(kept, rel=WORST)


def test_an_encoder_keeps_its_patches_and_tokens():
    own = {"tokens_per_image": 8, "patch_size": 12, "max_images_per_sample": 3}
    sizes = {
        "vision": ModuleSizes(**{**SMALL, **own}),
        LANGUAGE: ModuleSizes(**SMALL, vocab_size=8, seq_length=4),
    }
    modules = {"vision": parallel(), LANGUAGE: parallel()}
    found, _ = world(2).run("megatron_memory:saved", modules, sizes, 2)
    expected = stage_activations(sizes["vision"], parallel(), 0, samples=2)[0]
    assert expected == pytest.approx(found["vision"], rel=WORST)
