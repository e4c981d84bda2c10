"""From what DDP delivers for a module to the gradient of the one loss: times c_m.

DDP multiplies each bucket by a factor before it reduces it, and skips the pass where that factor is
1. So c_m is put into that factor once, when the coordinator is built, and DDP's own pass does the
work, or there is none. The 1/N of a per-token loss is known when the step is over. It touches only
what was reduced: with the distributed optimizer that is this rank's shard of each bucket.
"""

import torch

from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp


class GradientScaling:
    """Multiplies the gradients of one module by c_m and by 1/N.

    Args:
        ddp: the module.
        factor: c_m of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`.
        changes: where is recorded what DDP multiplies by.
    """

    def __init__(self, ddp: ModuleDdp, factor: float, changes: Changes) -> None:
        ddp.scale_in_reduction(factor, changes)
        self._everything = ddp.reduced(everything=True)
        self._shards = ddp.reduced(everything=False)

    def apply(self, inverse_tokens: torch.Tensor | None, everything: bool) -> None:
        """Scale the reduced gradients by what is missing. No host sync: safe inside a CUDA graph.

        Args:
            inverse_tokens: 1/N as a tensor without dims, None for a mean loss.
            everything: whether whole buckets were reduced, and not only this rank's shards.
        """
        grads = self._everything if everything else self._shards
        if inverse_tokens is not None and grads:
            torch._foreach_mul_(grads, inverse_tokens)
