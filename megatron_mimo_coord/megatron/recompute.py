"""Blocks whose activations are recomputed in backward: their gradients where their input has none.

Megatron's checkpointing, as PyTorch's with ``use_reentrant``, gives an output no gradient if no
input needs one: what is inside stays at zero. So it is where the word embeddings are frozen, and a
replica has no image, or the encoder is frozen too. Leans on blocks being modules with a config, a
list of ``layers``, and ``hidden_states`` as their input. Without these such gradients are lost.
"""

from typing import Any

import torch
from torch.nn import ModuleList

from megatron_mimo_coord.megatron.changes import Changes

INPUT = "hidden_states"


def keep_gradients_of_recomputed_blocks(module: torch.nn.Module, changes: Changes) -> None:
    """Have the input of each block that recomputes, and trains, need a gradient."""
    for block in module.modules():
        recomputes = getattr(getattr(block, "config", None), "recompute_granularity", None)
        layers = getattr(block, "layers", None)
        trains = any(parameter.requires_grad for parameter in block.parameters())
        if recomputes and isinstance(layers, ModuleList) and trains:
            handle = block.register_forward_pre_hook(_require_gradient, with_kwargs=True)
            changes.on_close(handle.remove)


def _require_gradient(
    block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if INPUT in kwargs:
        kwargs = {**kwargs, INPUT: _requiring(kwargs[INPUT])}
    elif args:
        args = (_requiring(args[0]), *args[1:])
    return args, kwargs


def _requiring(hidden: Any) -> Any:
    if not torch.is_tensor(hidden) or hidden.requires_grad or not torch.is_grad_enabled():
        return hidden
    return hidden.detach().requires_grad_()
