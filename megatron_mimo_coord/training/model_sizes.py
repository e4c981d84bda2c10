"""Sizes of a module that the shapes of its tensors do not tell, such as its number of heads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_mimo_coord.megatron.module_configs import configs_inside

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "gated_linear_unit",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "vocab_size",  # of Megatron-Bridge's configs: the vocabulary before it is padded
)


def model_sizes(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Those of each part of a module that has a config of its own. JSON."""
    found: list[dict[str, Any]] = []
    for config in configs_inside(module):
        sizes = {name: getattr(config, name, None) for name in _SIZES}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        if sizes not in found:
            found.append(sizes)
    return found


def size_problems(
    name: str, here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What differs between a module and the one that was saved.

    Args:
        name: of the module.
        here: its parts on this rank.
        saved: its parts on all ranks that saved it; nothing is compared where there is none.
    """
    for sizes in here:
        differences = [[size for size in _SIZES if sizes.get(size) != e.get(size)] for e in saved]
        fewest = min(differences, key=len, default=[])
        for size in fewest:
            alike = saved[differences.index(fewest)]
            yield (
                f"{size} of module {name!r} is {alike.get(size)} in the checkpoint, "
                f"{sizes.get(size)} here"
            )
