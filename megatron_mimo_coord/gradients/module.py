"""From what DDP delivers for a module to the gradient of the one loss: times c_m.

DDP multiplies each bucket by a factor before it reduces it, and skips the pass where that factor is
1. So c_m is put into that factor once, when the coordinator is built, and DDP's own pass does the
work, or there is none. The 1/N of a per-token loss is known when the step is over. It touches only
what was reduced: with the distributed optimizer that is this rank's shard of each bucket.
"""

from copy import copy
from functools import cached_property

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.profiler_ranges import named_range
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.ddp import ModuleDdp


class ModuleGradients:
    """The gradients of one module on this rank.

    Args:
        job: has its c_m, of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`.
        name: the module.
    """

    def __init__(self, job: Job, name: str) -> None:
        self.name = name
        self.ddp = ddp = ModuleDdp(job.ddps[name])
        self.pg_collection = self._pg_collection_to_finalize = job.groups[name]
        if name != LANGUAGE:
            # Encoders tie no word embeddings, but Megatron looks for them where there is a group.
            self._pg_collection_to_finalize = copy(self.pg_collection)
            self._pg_collection_to_finalize.embd = self._pg_collection_to_finalize.pos_embd = None
        ddp.scale_in_reduction(job.gradient_scaling_factors[name], job.changes)
        self._everything = ddp.reduced(everything=True)
        self._shards = ddp.reduced(everything=False)

    @cached_property
    def counted(self) -> list[torch.Tensor]:
        """The parts of the gradients that no other rank counts in a norm."""
        return list(self.ddp.disjoint_parts(self.pg_collection))

    def finalize(self, force_all_reduce: bool) -> None:
        """Megatron's own finalize, of this module alone and without the 1/N."""
        with named_range(self.name), self.ddp.frozen_routers_at_rest():
            finalize_model_grads(
                [self.ddp.ddp],
                num_tokens=None,
                pg_collection=self._pg_collection_to_finalize,
                force_all_reduce=force_all_reduce,
            )

    def divide(self, inverse_tokens: torch.Tensor, force_all_reduce: bool) -> None:
        """Multiply what was reduced by 1/N, a tensor without dims. No host sync."""
        everything = self.ddp.reduces_everything(force_all_reduce)
        grads = self._everything if everything else self._shards
        if grads:
            torch._foreach_mul_(grads, inverse_tokens)
