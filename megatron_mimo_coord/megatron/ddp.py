"""Megatron's DDP: how it lays a module's gradients out, scales them, and gathers parameters.

Leans on ``DistributedDataParallel`` keeping its gradients in flat buffers, dense and expert, cut
into buckets, in groups; and on each bucket's ``gradient_scaling_factor``, by which DDP multiplies
before it reduces, and not at all if it is 1. Without these no gradient can be scaled or measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe.router import Router

from megatron_mimo_coord.layout import MAX_RANKS
from megatron_mimo_coord.megatron.bucket_groups import BucketGroup
from megatron_mimo_coord.megatron.changes import Changes


class ModuleDdp:
    """The DDP of a module.

    Args:
        ddp: Megatron's.

    Attributes:
        settings: the ``DistributedDataParallelConfig``.
        delivers_sum: whether a gradient is the sum over the replicas; else it is their mean.
        replicas: DP x CP.
        params: the trainable parameters.
        grads: the gradient buffers.
        groups: the bucket groups, as Megatron lists them.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp
        self.settings = ddp.ddp_config
        self.delivers_sum = bool(ddp.config.calculate_per_token_loss)
        self.replicas: int = ddp.dp_cp_group.size()
        self.params: list[Any] = ddp.params_with_grad
        self._buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
        self.grads: list[torch.Tensor] = [buffer.grad_data for buffer in self._buffers]
        # Beside their buffer, in a dtype of their own.
        self._extra = [grad for buffer in self._buffers for grad in buffer.extra_main_grads]
        dense, experts = ddp.bucket_groups, ddp.expert_parallel_bucket_groups
        self.groups = [BucketGroup(group, self.settings, ddp.dp_cp_group) for group in dense]
        self.groups += [BucketGroup(group, self.settings, ddp.expt_dp_group) for group in experts]
        self._frozen_routers = [
            module
            for module in ddp.modules()
            if isinstance(module, Router) and not any(p.requires_grad for p in module.parameters())
        ]

    # -- gradients ---------------------------------------------------------------------------------

    @property
    def owns_its_gradients(self) -> bool:
        """Whether backward adds to these buffers, and not to those of a DDP around this one."""
        storages = {grad.untyped_storage().data_ptr() for grad in (*self.grads, *self._extra)}
        return all(
            param.main_grad.untyped_storage().data_ptr() in storages for param in self.params
        )

    def frozen_since(self) -> list[str]:
        """Weights that were put into buffers, and need no gradient any more."""
        held = set(map(id, self.params))
        named = self.ddp.module.named_parameters()
        return [name for name, param in named if id(param) in held and not param.requires_grad]

    def misplaced(self) -> list[str]:
        """Weights that are no more as they were when they were put into buffers.

        The distributed optimizer updates and gathers a buffer of weights, not what has taken their
        place; and DDP hears of no gradient of what has got another data type since.
        """
        buffers = {id(param): buffer for buffer in self._buffers for param in buffer.params}
        found = []
        for name, param in self.ddp.module.named_parameters():
            buffer = buffers.get(id(param))
            # Others, such as those in fp8, have several tensors inside.
            if buffer is not None and type(param) is torch.nn.Parameter:
                is_moved = buffer.param_data is not None and (
                    buffer.param_data.untyped_storage().data_ptr()
                    != param.untyped_storage().data_ptr()
                )
                found += [name] if is_moved or param.dtype != buffer.param_dtype else []
        return found

    def scale_in_reduction(self, factor: float, changes: Changes) -> None:
        """Have DDP multiply gradients by ``factor`` besides, in its own pass or in none."""
        for group in self.groups:
            for bucket in group.buckets:
                product = _product(bucket.gradient_scaling_factor, factor)
                changes.set(bucket, "gradient_scaling_factor", product)

    def reduced(self, everything: bool) -> list[torch.Tensor]:
        """What holds reduced gradients: whole buffers, or this rank's shards of their buckets."""
        shards = (
            bucket.grad_data[slice(*group.shard(bucket))]
            for group in self.groups
            for bucket in group.buckets
        )
        return [*(self.grads if everything else shards), *self._extra]

    def reduces_everything(self, force_all_reduce: bool) -> bool:
        """Whether whole buckets are reduced, and not only this rank's shards of them.

        Overlapped reductions are launched before anyone knows of the caller's ``force_all_reduce``.
        """
        if not self.settings.use_distributed_optimizer:
            return True
        return self.forces_all_reduce if self.settings.overlap_grad_reduce else force_all_reduce

    @property
    def forces_all_reduce(self) -> bool:
        """Whether the overlapped reductions are of whole buckets."""
        return bool(self.ddp.force_all_reduce)

    def disjoint_parts(self, pg_collection: ProcessGroupCollection) -> Iterator[torch.Tensor]:
        """The reduced gradients dealt out to the module's ranks, each element to one of them."""
        expert_tp = getattr(pg_collection, "expt_tp", None)

        def counts(param: torch.nn.Parameter) -> bool:
            return param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(
                param, pg_collection.tp, expert_tp
            )

        for group in self.groups:
            for bucket in group.buckets:
                start, end = group.own_part(bucket)
                for param in filter(counts, bucket.params_list):
                    first, last = bucket.param_to_index[param]
                    if max(first, start) < min(last, end):
                        yield bucket.grad_data[max(first, start) : min(last, end)]

    @property
    def gradient_bytes(self) -> tuple[float, float]:
        """Bytes of the dense gradients, and of the experts' divided by an expert's replicas."""
        dense = sum(buffer.grad_data.nbytes for buffer in self.ddp.buffers)
        experts = sum(buffer.grad_data.nbytes for buffer in self.ddp.expert_parallel_buffers)
        return dense, experts / self.ddp.expt_dp_group.size()

    def route_zeroing(
        self, before: Callable[[], None], after: Callable[[], None], changes: Changes
    ) -> None:
        """Around ``zero_grad_buffer``, whoever calls it."""
        zero = self.ddp.zero_grad_buffer

        def zero_grad_buffer() -> None:
            before()
            zero()
            for param in self.params:
                # An optimizer in fp32 leaves main_grad here, where backward would add to it twice.
                param.grad = None
            after()

        changes.set(self.ddp, "zero_grad_buffer", zero_grad_buffer)

    def leave_nan_to_the_optimizer(self, changes: Changes) -> None:
        """Have DDP not look for NaN itself: it raises on one rank, and its peers wait for ever."""
        changes.set(self.settings, "check_for_nan_in_grad", False)

    @contextmanager
    def frozen_routers_at_rest(self) -> Iterator[None]:
        """Inside, a mixture of experts whose router is frozen is not balanced.

        Megatron's finalize moves a bias of each router that trains, whether or not its weights do.
        """
        training = [router for router in self._frozen_routers if router.training]
        for router in training:
            router.training = False
        try:
            yield
        finally:
            for router in training:
                router.training = True

    # -- parameters --------------------------------------------------------------------------------

    @property
    def waits_in_forward(self) -> bool:
        """Whether forward waits for the gathers of parameters, and asks for them.

        It does not in the first step of Megatron-LM's training loop, where they are as they must
        be.
        """
        return bool(self.ddp.remove_forward_pre_hook_handles)

    def gather_now(self) -> None:
        """Gather all parameters, and wait. Collective in the module."""
        with torch.no_grad():
            self.ddp.start_param_sync(force_sync=True)


def _product(left: float, right: float) -> float:
    """Of ratios of sizes, which floats only come near: 1/49 x 49 is 1, and needs no pass."""
    ratios = (Fraction(value).limit_denominator(MAX_RANKS) for value in (left, right))
    return float(next(ratios) * next(ratios))
