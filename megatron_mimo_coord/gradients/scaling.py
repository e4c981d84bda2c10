"""From what DDP delivers for a module to the gradient of the one loss.

DDP multiplies each bucket by ``bucket.gradient_scaling_factor`` before it reduces it, and skips the
pass where that factor is 1. Whether DDP was set up to sum or to average, the sum over the replicas
is what the loss needs, divided by the language model's R_language replicas or by its N tokens. So
the factor is set once, when the coordinator is built, to

    1/R_language   if the loss is a mean over replicas: DDP's own pass does all the work
    1              if the loss counts tokens: DDP only sums, and 1/N follows when N is known

(times the size of the reduction's group where the collective itself averages). The 1/N touches only
what was reduced: with the distributed optimizer that is this rank's shard of each bucket.

The factor is set and never multiplied: a second coordinator on the same model changes nothing.
"""

import inspect

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.gradients.buckets import buckets, grad_buffers, shards
from megatron_mimo_coord.layout import gradient_scaling_factor

_FACTOR_OF_DDP = "_mimo_factor_of_ddp"


class GradientNormalizer:
    """Scales the gradients of one module.

    Args:
        ddp: the module, wrapped in Megatron's DDP.
        replicas: R_m = DP x CP of the module.
        language_replicas: R_language = DP x CP of the language model.
        per_token: whether the language model's loss is divided by the number of tokens.

    Attributes:
        factor: c_m of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`.
        fast: whether the factor rides on DDP's own; else it is a pass of its own afterwards.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        *,
        replicas: int,
        language_replicas: int,
        per_token: bool,
    ) -> None:
        self.factor = gradient_scaling_factor(
            replicas,
            language_replicas,
            ddp_sums=bool(ddp.config.calculate_per_token_loss),
            per_token=per_token,
        )
        self._ddp = ddp
        self.fast = rides_on_ddp(ddp)
        if not self.fast:
            for bucket, _ in buckets(ddp):
                if hasattr(bucket, _FACTOR_OF_DDP):
                    bucket.gradient_scaling_factor = getattr(bucket, _FACTOR_OF_DDP)
            return
        loss_factor = 1.0 if per_token else 1.0 / language_replicas
        for bucket, group_size in buckets(ddp):
            if not hasattr(bucket, _FACTOR_OF_DDP):
                setattr(bucket, _FACTOR_OF_DDP, bucket.gradient_scaling_factor)
            averaged_over = group_size if ddp.ddp_config.average_in_collective else 1
            bucket.gradient_scaling_factor = averaged_over * loss_factor
        extra = [grad for buffer in grad_buffers(ddp) for grad in buffer.extra_main_grads]
        self._everything = [buffer.grad_data for buffer in grad_buffers(ddp)] + extra
        self._shards = list(shards(ddp)) + extra

    def apply(self, inverse_tokens: torch.Tensor | None, everything: bool) -> None:
        """Scale the reduced gradients. No host sync: safe inside a CUDA graph.

        Args:
            inverse_tokens: 1/N as a tensor without dims, None for a mean loss.
            everything: whether whole buckets were reduced, and not only this rank's shards.
        """
        if not self.fast:
            scale = self.factor if inverse_tokens is None else self.factor * inverse_tokens
            if inverse_tokens is not None or self.factor != 1.0:
                self._ddp.scale_gradients(scale)
        elif inverse_tokens is not None:
            grads = self._everything if everything else self._shards
            if grads:
                torch._foreach_mul_(grads, inverse_tokens)


def rides_on_ddp(ddp: DistributedDataParallel) -> bool:
    """Whether this Megatron-Core scales gradient buckets in the way that the fast path relies on.

    Checked: the reduction reads ``gradient_scaling_factor``; each bucket's is one that DDP 0.19
    (or an earlier coordinator) would have set; buffers and shards are where they are expected.
    """
    replicas, expert_replicas = ddp.dp_cp_group.size(), ddp.expt_dp_group.size()
    expected = {1.0, 1.0 / replicas, expert_replicas / replicas}
    groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]
    reductions = [inspect.unwrap(type(group).start_grad_sync) for group in groups]
    return (
        all("gradient_scaling_factor" in code.__code__.co_names for code in reductions)
        and all(
            hasattr(bucket, "gradient_scaling_factor")
            and getattr(bucket, _FACTOR_OF_DDP, bucket.gradient_scaling_factor) in expected
            for bucket, _ in buckets(ddp)
        )
        and all(hasattr(buffer, "extra_main_grads") for buffer in grad_buffers(ddp))
        and all(
            hasattr(group, "intra_distributed_optimizer_instance_size")
            for group in groups
            if ddp.ddp_config.use_distributed_optimizer
        )
    )
