"""The ``TransformerConfig`` by which Megatron finalizes the gradients of a module.

Leans on ``MegatronModule`` having its config as ``config``, and on a modality's container having
its encoders in ``encoders``. Without these a module is finalized by the settings of another.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.module import Float16Module

SIZES = (
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
"""Settings that are one model's, and that the shapes of its tensors do not tell."""


def config_of(name: str, module: torch.nn.Module) -> ModelParallelConfig:
    """The config of a module, or of the encoders inside it.

    Raises:
        ValueError: there is none, or encoders have several that differ.
    """
    while isinstance(module, Float16Module):
        module = module.module
    found = list(_outermost(module)) or list(_outermost(getattr(module, "encoders", module), True))
    cure = f'wrap_in_ddp(model, ddp_config, configs={{"{name}": config}})'
    if not found:
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) holds no Megatron module with a config, by "
            f"which its gradients are to be finalized: pass one, {cure}"
        )
    settings: list[dict[str, Any]] = [vars(each) for each in found]
    different = {
        key
        for key, value in settings[0].items()
        for theirs in settings[1:]
        if not callable(value) and not (theirs.get(key) is value or theirs.get(key) == value)
    }
    if different:
        raise ValueError(
            f"the encoders of module {name!r} have configs that differ in "
            f"{', '.join(sorted(different))}, and its gradients are finalized by one: pass it, "
            f"{cure}"
        )
    return found[0]


def configs_inside(module: torch.nn.Module) -> list[ModelParallelConfig]:
    """Of all Megatron modules that are in no other; none where a module is none of Megatron's.

    What is inside one may have copies of its config that depend on the layout.
    """
    return list(_outermost(module, True))


def _outermost(module: torch.nn.Module, inside: bool = False) -> Iterator[ModelParallelConfig]:
    """Configs that are in no module with one; those of a module's children too if asked."""
    config = getattr(module, "config", None)
    if isinstance(config, ModelParallelConfig):
        yield config
    elif inside:
        for child in module.children():
            yield from _outermost(child, inside)
