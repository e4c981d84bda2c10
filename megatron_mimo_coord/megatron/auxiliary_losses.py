"""What a mixture of experts adds to the gradient beside the one loss, and what scales it.

Megatron's schedule scales the auxiliary losses of all modules by the language model's config, and
only if that is of a mixture; a router multiplies its own by its tokens if its module counts tokens.
Leans on the schedule calling ``experimental_attention_variant_loss_scale_func`` of the config with
the same scale in every forward, on one scale for the process, and on a router's
``calculate_per_token_loss``. Without these a mixture in an encoder learns at another rate.
"""

from collections.abc import Callable

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router

from megatron_mimo_coord.megatron.changes import Changes

SCALE_HOOK = "experimental_attention_variant_loss_scale_func"
"""The place in a config of what the schedule tells the scale to."""


def scale_of(config: ModelParallelConfig) -> Callable[[torch.Tensor], None] | None:
    """What the schedule is to tell the scale to, where it does not tell it to mixtures itself."""
    if getattr(config, "num_moe_experts", None) is not None:
        return None
    return _both if getattr(config, "experimental_attention_variant", None) == "dsa" else _mixtures


def _mixtures(scale: torch.Tensor) -> None:
    MoEAuxLossAutoScaler.set_loss_scale(scale)


def _both(scale: torch.Tensor) -> None:
    DSAIndexerLossAutoScaler.set_loss_scale(scale)
    MoEAuxLossAutoScaler.set_loss_scale(scale)


def weigh_like_the_loss(module: torch.nn.Module, per_token: bool, changes: Changes) -> bool:
    """Have routers multiply by their tokens if the loss will be divided by tokens, and only then.

    Args:
        module: whose routers.
        per_token: whether the one loss is divided by its tokens, whatever the module's DDP does.
        changes: where is recorded what is set.

    Returns:
        Whether there are routers.
    """
    routers = [router for router in module.modules() if isinstance(router, Router)]
    for router in routers:
        changes.set(router, "calculate_per_token_loss", per_token)
    return bool(routers)
