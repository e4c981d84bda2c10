"""Modules that meet their replicas in a forward, and how they run a batch of nothing.

A mixture sends tokens to experts on other ranks; a normalization may be over all replicas; whoever
keeps a process group as an attribute uses it, and of a collection of groups those that its forward
names. Leans on experts being shared out over a dispatcher's ``tp_ep_group``, on a router's
``tp_dp_cp_group``, ``gating`` and methods that add auxiliary losses, and on ``forward`` of an
attention. Without these a rank without an image leaves others waiting.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from inspect import getclosurevars, isfunction, unwrap
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn import SyncBatchNorm
from torch.nn.functional import pad

from megatron_mimo_coord.megatron.changes import Changes


def meets_replicas(module: torch.nn.Module, own_ranks: Set[int]) -> bool:
    """Whether a forward of a module may launch a collective with ranks of other replicas."""
    return any(
        set(dist.get_process_group_ranks(group)) - own_ranks
        for each in module.modules()
        for group in _groups(each)
    )


def _groups(module: Any) -> Iterator[dist.ProcessGroup | None]:
    """Those that a forward of a module itself uses; None for the world."""
    if isinstance(module, MoELayer):
        yield module.token_dispatcher.tp_ep_group
    elif isinstance(module, TopKRouter):
        if module.get_aux_loss_coeff("global_aux_loss") > 0:
            yield module.tp_dp_cp_group
    elif isinstance(module, SyncBatchNorm):
        yield module.process_group
    elif not type(module).__module__.startswith("megatron."):
        for name, held in vars(module).items():
            if isinstance(held, ProcessGroupCollection):
                yield from _named_groups(type(module), name, vars(held))
            else:
                yield from _held_groups(held)


def _held_groups(held: Any) -> Iterator[dist.ProcessGroup]:
    """What an attribute holds, alone or among others."""
    if isinstance(held, dist.ProcessGroup):
        yield held
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from _held_groups(each)
    elif isinstance(held, dict):
        yield from _held_groups(list(held.values()))


def _named_groups(
    kind: type, attribute: str, groups: Mapping[str, Any]
) -> Iterator[dist.ProcessGroup]:
    """Of a collection that is an attribute, what a forward names; all if it names just that."""
    names = _names_in_forward(kind)
    if attribute in names:
        named = [group for name, group in groups.items() if name in names]
        yield from _held_groups(named or list(groups.values()))


def _names_in_forward(kind: type) -> Set[str]:
    """Attributes that a class's ``forward`` reads, and its methods and properties that it uses."""
    found: set[str] = set()
    to_read = {"forward"}
    while to_read:
        name = to_read.pop()
        found.add(name)
        method: Any = getattr(kind, name, None)
        method = unwrap(getattr(method, "fget", method))
        if isfunction(method):
            to_read.update(*getclosurevars(method))
            to_read -= found
    return found


def run_empty_batches(module: torch.nn.Module, changes: Changes) -> None:
    """Have Megatron's layers run a batch without samples: they launch what they always launch."""
    for each in module.modules():
        if isinstance(each, Attention):
            changes.set(each, "forward", _with_a_sample(each.forward))
        if isinstance(each, TopKRouter):
            changes.set(each, "gating", _with_a_sample(each.gating))
            for name in ("apply_z_loss", "_apply_aux_loss", "_apply_seq_aux_loss"):
                changes.set(each, name, _if_any(getattr(each, name)))
            apply = _global_aux_loss(each, each._apply_global_aux_loss)
            changes.set(each, "_apply_global_aux_loss", apply)


def _with_a_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot reshape nothing gets one sample of zeros, of which nothing is kept.

    ``hidden``: [sequence, sample, hidden]; so is what is returned, or the first of it.
    """

    def with_a_sample(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1]:
            return function(hidden, *args, **kwargs)
        returned = function(pad(hidden, (0, 0, 0, 1)), *args, **kwargs)
        if isinstance(returned, tuple):
            output, bias = returned
            return output[:, :0], bias
        return returned[:, :0]

    return with_a_sample


def _if_any(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An auxiliary loss is a mean over tokens: where there are none it is left out."""

    def apply_if_any(activation: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return apply(activation, *args, **kwargs) if len(activation) else activation

    return apply_if_any


def _global_aux_loss(router: TopKRouter, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Replicas tell each other their experts' tokens, those without any too."""

    def apply_global_aux_loss(
        probs: torch.Tensor, scores: torch.Tensor, routing_map: torch.Tensor, **options: Any
    ) -> Any:
        if len(probs) or not router.get_aux_loss_coeff("global_aux_loss"):
            return apply(probs, scores, routing_map, **options)
        counts, *_ = get_tokens_per_expert_and_token_count(
            routing_map, router.tp_dp_cp_group, topk=router.topk
        )
        router.global_tokens_per_expert += counts
        router.ga_steps += 1
        return probs

    return apply_global_aux_loss
