"""What a mixture of experts adds to the gradient beside the one loss, and what scales it.

Megatron's schedule scales the auxiliary losses of all modules by the language model's config, and
only if that is of a mixture; a router multiplies its own by its tokens if its module counts tokens.
Leans on the schedule calling ``experimental_attention_variant_loss_scale_func`` of the config with
the same scale in every forward, on one scale for the process, and on a router's
``calculate_per_token_loss``. Without these a mixture in an encoder learns at another rate. Routers
also record what they add, in one table of layers for the process.
"""

from collections.abc import Callable, Iterable

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router, TopKRouter

from megatron_mimo_coord.megatron.changes import Changes

SCALE_HOOK = "experimental_attention_variant_loss_scale_func"
"""The place in a config of what the schedule tells the scale to."""


def scale_of(
    config: ModelParallelConfig, context_parallel_size: int
) -> Callable[[torch.Tensor], None] | None:
    """What the schedule is to tell the scale to, where it does not tell it to mixtures itself.

    Args:
        config: that of the schedule.
        context_parallel_size: what the schedule multiplies the scale by on ranks of the language
            model alone, on others; else 1.
    """
    if getattr(config, "num_moe_experts", None) is not None and context_parallel_size == 1:
        return None
    is_dsa = getattr(config, "experimental_attention_variant", None) == "dsa"

    def tell(scale: torch.Tensor) -> None:
        if is_dsa:
            DSAIndexerLossAutoScaler.set_loss_scale(scale)
        MoEAuxLossAutoScaler.set_loss_scale(scale * context_parallel_size)

    return tell


def weigh_like_the_loss(module: torch.nn.Module, per_token: bool, changes: Changes) -> bool:
    """Have routers multiply by their tokens if the one loss will be divided by its tokens.

    And only then, whatever the module's DDP does. Returns whether there are routers.
    """
    routers = [router for router in module.modules() if isinstance(router, Router)]
    for router in routers:
        changes.set(router, "calculate_per_token_loss", per_token)
    return bool(routers)


_RECORDED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""What a router calls its auxiliary losses where it records them."""
_Z_LOSS = "z_loss"


def recorded_depths(modules: Iterable[torch.nn.Module]) -> list[int]:
    """Of each auxiliary loss, layers of the deepest mixture that records it; 0 if none does."""
    depths = dict.fromkeys((*_RECORDED.values(), _Z_LOSS), 0)
    for router in (each for module in modules for each in module.modules()):
        if isinstance(router, TopKRouter):
            config = router.config
            kinds = [kind for kind in _RECORDED if router.get_aux_loss_coeff(kind) > 0]
            has_z_loss = getattr(config, f"moe_{_Z_LOSS}_coeff", None) is not None
            for name in [_RECORDED[kind] for kind in kinds] + [_Z_LOSS] * has_z_loss:
                depths[name] = max(depths[name], config.num_layers)
    return [*depths.values()]


def make_room_for_metrics(depths: Iterable[int], device: torch.device) -> None:
    """Have routers of any depth record into tables as long as the deepest.

    Args:
        depths: as :func:`recorded_depths` says them, the largest of all ranks.
        device: of the tables.
    """
    depths = [*depths]
    for name, depth in zip((*_RECORDED.values(), _Z_LOSS), depths, strict=True):
        if depth:
            get_moe_metrics_tracker().ensure_initialized(name, max(depths), device)
