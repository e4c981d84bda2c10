"""From what DDP delivers for a module to the gradient of the one loss: times c_m.

DDP multiplies each bucket by ``bucket.gradient_scaling_factor`` before it reduces it, and skips the
pass where that factor is 1. So c_m is put into that factor once, when the coordinator is built, and
DDP's own pass does the work, or there is none. The 1/N of a per-token loss is known when the step
is over. It touches only what was reduced: with the distributed optimizer that is this rank's shard
of each bucket.

Where an installed Megatron-Core does not scale its buckets so, the gradients are scaled in a pass
of their own after the reduction.
"""

from fractions import Fraction
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.gradients.buckets import buckets, grad_buffers, shards
from megatron_mimo_coord.layout import MAX_RANKS

_own_factors: WeakKeyDictionary[DistributedDataParallel, list[Any]] = WeakKeyDictionary()
"""What Megatron set the factor of each bucket to: a later coordinator finds an earlier one's."""


class GradientScaling(Protocol):
    """Multiplies the gradients of one module by c_m and by 1/N."""

    def apply(self, inverse_tokens: torch.Tensor | None, everything: bool) -> None:
        """Scale the reduced gradients. No host sync: safe inside a CUDA graph.

        Args:
            inverse_tokens: 1/N as a tensor without dims, None for a mean loss.
            everything: whether whole buckets were reduced, and not only this rank's shards.
        """


def gradient_scaling(ddp: DistributedDataParallel, factor: float) -> GradientScaling:
    """The scaling of a module.

    Args:
        ddp: the module, wrapped in Megatron's DDP.
        factor: c_m of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`.
    """
    way = ScalingInReduction if can_scale_in_reduction(ddp) else ScalingAfterReduction
    return way(ddp, factor)


def can_scale_in_reduction(ddp: DistributedDataParallel) -> bool:
    """Whether each bucket has a factor, and it is one that DDP 0.19 sets."""
    replicas, expert_replicas = ddp.dp_cp_group.size(), ddp.expt_dp_group.size()
    expected = {1.0, 1.0 / replicas, expert_replicas / replicas}
    return all(factor in expected for factor in _own_factors_of(ddp))


class ScalingInReduction:
    """DDP multiplies by c_m with its own factor. Set and never multiplied: twice changes nothing.

    Args:
        ddp: the module, wrapped in Megatron's DDP.
        factor: c_m.
    """

    def __init__(self, ddp: DistributedDataParallel, factor: float) -> None:
        for bucket, own in zip(buckets(ddp), _own_factors_of(ddp), strict=True):
            bucket.gradient_scaling_factor = _product(own, factor)
        extra = [grad for each in grad_buffers(ddp) for grad in each.extra_main_grads]
        self._everything = [buffer.grad_data for buffer in grad_buffers(ddp)] + extra
        self._shards = list(shards(ddp)) + extra

    def apply(self, inverse_tokens: torch.Tensor | None, everything: bool) -> None:
        """Only 1/N is missing."""
        grads = self._everything if everything else self._shards
        if inverse_tokens is not None and grads:
            torch._foreach_mul_(grads, inverse_tokens)


class ScalingAfterReduction:
    """A pass over all gradients of the module, whatever DDP did.

    Args:
        ddp: the module, wrapped in Megatron's DDP.
        factor: c_m.
    """

    def __init__(self, ddp: DistributedDataParallel, factor: float) -> None:
        self._ddp = ddp
        self._factor = factor

    def apply(self, inverse_tokens: torch.Tensor | None, everything: bool) -> None:
        """Both factors at once."""
        if inverse_tokens is not None:
            self._ddp.scale_gradients(self._factor * inverse_tokens)
        elif self._factor != 1.0:
            self._ddp.scale_gradients(self._factor)


def _own_factors_of(ddp: DistributedDataParallel) -> list[Any]:
    """Megatron's factor of each bucket, None for one that has none."""
    if ddp not in _own_factors:
        _own_factors[ddp] = [
            getattr(bucket, "gradient_scaling_factor", None) for bucket in buckets(ddp)
        ]
    return _own_factors[ddp]


def _product(left: float, right: float) -> float:
    """Of ratios of sizes, which floats only come near: 1/49 x 49 is 1, and needs no pass."""
    ratios = (Fraction(value).limit_denominator(MAX_RANKS) for value in (left, right))
    return float(next(ratios) * next(ratios))
