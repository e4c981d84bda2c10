"""Weights, gradient buffers and optimizer state are what Megatron allocates on real ranks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import parallel
from ranks import world

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism, pack
from megatron_mimo_coord.planning.model_states import model_states, padded
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import Parameter

SHARDED = {"use_distributed_optimizer": True}
LLAMA = {
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "num_query_groups": 2,
    "kv_channels": 24,
    "ffn_hidden_size": 160,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
}
MIXTURE = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 40,
    "add_bias_linear": False,
}
LANGUAGE_ONLY = ("position_embedding_type", "share_embeddings_and_output_weights", "qk_layernorm")
CASES: dict[str, dict[str, Any]] = {
    "fp32": {
        "modules": {"vision": parallel(dp=2), LANGUAGE: parallel(tp=2)},
    },
    "TP, PP, tied, bf16": {
        "modules": {LANGUAGE: parallel(tp=2, pp=2)},
        "sizes": {"share_embeddings_and_output_weights": True, "params_dtype": "bf16"},
    },
    "sharded, tied, PP": {
        "modules": {LANGUAGE: parallel(pp=2, dp=2)},
        "sizes": {"share_embeddings_and_output_weights": True, "params_dtype": "bf16", **SHARDED},
    },
    "sharded, tied, fp32 gradients": {
        "modules": {"vision": parallel(pp=2), LANGUAGE: parallel(dp=2)},
        "sizes": {
            "share_embeddings_and_output_weights": True,
            "params_dtype": "bf16",
            "grad_reduce_in_fp32": True,
            **SHARDED,
        },
    },
    "sharded, buckets, Llama": {
        "modules": {"vision": parallel(dp=2), LANGUAGE: parallel(dp=2)},
        "sizes": {
            **SHARDED,
            **LLAMA,
            "overlap_grad_reduce": True,
            "bucket_size": 10_000,
            "position_embedding_type": "rope",
        },
    },
    "experts, EP": {
        "modules": {LANGUAGE: parallel(dp=4, expert_model_parallel_size=2)},
        "sizes": {**SHARDED, **MIXTURE, "params_dtype": "bf16"},
    },
    "experts, expert TP": {
        "modules": {LANGUAGE: parallel(tp=2, dp=2, expert_tensor_parallel_size=1)},
        "sizes": {**SHARDED, **MIXTURE, "sequence_parallel": True, "moe_layer_freq": [0, 1]},
    },
    "experts, EP and expert TP": {
        "modules": {
            LANGUAGE: parallel(
                tp=2, dp=2, expert_tensor_parallel_size=1, expert_model_parallel_size=4
            )
        },
        "sizes": {**MIXTURE, "gated_linear_unit": True, "sequence_parallel": True},
    },
    "colocated, frozen encoder": {
        "modules": {"vision": parallel(dp=4, rank_offset=0), LANGUAGE: parallel(2, dp=2, rank_offset=0)},
        "sizes": {**SHARDED, "params_dtype": "bf16"},
        "frozen": True,
    },
}  # fmt: skip


def sizes_of(name: str, case: dict[str, Any]) -> ModuleSizes:
    """The sizes of a module of a case, as a user of the planner states them."""
    given = dict(case.get("sizes", {}))
    if name == LANGUAGE:
        own = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128, "seq_length": 32}
        return ModuleSizes(num_layers=2, **{**own, **given})
    for key in LANGUAGE_ONLY:
        given.pop(key, None)
    own = {"tokens_per_image": 4, "patch_size": 12, "hidden_size": 32, "num_attention_heads": 4}
    return ModuleSizes(num_layers=2, **{**own, **given}, frozen=case.get("frozen", False))


@pytest.mark.parametrize("case", CASES)
def test_states_are_what_megatron_allocates(case):
    modules: dict[str, ModuleParallelism] = CASES[case]["modules"]
    sizes = {name: sizes_of(name, CASES[case]) for name in modules}
    grids = pack(modules)
    allocated = world(4).run("megatron_memory:allocated", modules, sizes)
    fullest: dict[tuple[str, int], list[float]] = {}
    for rank, found in enumerate(allocated):
        for name, held in found.items():
            stage = grids[name].coordinate(rank, "pp")
            most = fullest.setdefault((name, stage), list(held))
            most[2] = max(most[2], held[2])
            assert most[:2] == list(held[:2])
    assert len(fullest) == sum(grid.dim("pp") for grid in grids.values())
    for (name, stage), (weights, gradients, optimizer) in fullest.items():
        held = model_states(sizes[name], modules[name], stage, 64)
        assert held[:2] == (weights, gradients)
        assert 0.999 * optimizer <= held[2] <= 1.03 * optimizer, "padding of a small buffer"


parameters = st.builds(Parameter, st.integers(1, 500), is_shared=st.booleans())


@given(
    st.lists(parameters, min_size=1, max_size=8),
    st.integers(1, 300),
    st.none() | st.integers(1, 900),
)
def test_a_buffer_has_room_for_all_and_little_more(drawn, align, bucket_size):
    numel = sum(parameter.numel for parameter in drawn)
    length = padded(drawn, align, bucket_size)
    assert length % align == 0
    assert numel <= length < numel + len(drawn) * (align + 64)
