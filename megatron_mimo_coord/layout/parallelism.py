"""The parallel sizes of one module, as a user writes them down."""

from math import prod
from typing import Any

from attrs import Converter, frozen

from megatron_mimo_coord.layout.fields import checked, count, is_count

# Megatron's own order (tp-cp-ep-dp-pp). pp comes last because only then do the dense and the
# expert factorization share their pipeline groups whatever the other sizes are.
DIM_NAMES = ("tp", "cp", "dp", "pp")
EXPERT_DIM_NAMES = ("expt_tp", "ep", "expt_dp", "pp")
SIZE_FIELDS = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}
"""The field of :class:`ModuleParallelism` that gives a dim's size.

A grid that someone else made may have ``ep``, too, whose ranks read the same samples, as those of
``tp`` do. What other dims would mean for samples and gradients nobody knows.
"""

_RANKS = "write a number of ranks, or leave it out for the default"
_LAYERS = "write a number of layers, or leave it out for as many as the other stages have"


def _same_as_tensor_parallel(size: Any, module: Any) -> Any:
    return module.tensor_model_parallel_size if size is None else size


@frozen(kw_only=True, cache_hash=True)
class ModuleParallelism:
    """The parallel sizes of one module, as a user writes them down.

    Args:
        tensor_model_parallel_size: TP, ranks that share each layer's weights.
        context_parallel_size: CP, ranks that share each sequence.
        pipeline_model_parallel_size: PP, stages that share the layers.
        data_parallel_size: DP, replicas that share the batch.
        expert_model_parallel_size: EP, ranks that share the experts of a mixture-of-experts layer.
        expert_tensor_parallel_size: TP inside an expert; None means the same as TP.
        rank_offset: first global rank of the module; None packs it behind the modules before it.
        num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage: as in Megatron's
            ``TransformerConfig``, for stages of unequal numbers of layers; None for as many as the
            other stages have.

    Raises:
        ValueError: a size is not a positive integer, or TP x CP x DP ranks of a pipeline stage
            cannot be divided among expert TP x EP, or there is no stage that could be unequal.

    Example:
        >>> ModuleParallelism(tensor_model_parallel_size=2, data_parallel_size=4).size
        8
    """

    tensor_model_parallel_size: int = count(1, _RANKS)
    context_parallel_size: int = count(1, _RANKS)
    pipeline_model_parallel_size: int = count(1, _RANKS)
    data_parallel_size: int = count(1, _RANKS)
    expert_model_parallel_size: int = count(1, _RANKS)
    expert_tensor_parallel_size: int = count(
        None, _RANKS, converter=Converter(_same_as_tensor_parallel, takes_self=True)
    )
    rank_offset: int | None = checked(
        lambda value: is_count(value, least=0),
        "a rank, 0 or more and below 2**31",
        "write the module's first rank, or leave it out to pack it behind those before",
        default=None,
    )
    num_layers_in_first_pipeline_stage: int | None = count(None, _LAYERS)
    num_layers_in_last_pipeline_stage: int | None = count(None, _LAYERS)

    def __attrs_post_init__(self) -> None:
        if self.has_unequal_stages and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need a "
                "pipeline_model_parallel_size of 2 or more, got 1; leave them out, or raise it"
            )
        stage = self.size // self.pipeline_model_parallel_size
        expert = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        if stage % expert:
            raise ValueError(
                f"expert_tensor_parallel_size {self.expert_tensor_parallel_size} x "
                f"expert_model_parallel_size {self.expert_model_parallel_size} = {expert} does not "
                f"divide the {stage} ranks of a pipeline stage (TP "
                f"{self.tensor_model_parallel_size} x CP {self.context_parallel_size} x DP "
                f"{self.data_parallel_size}); choose expert sizes whose product divides {stage}"
            )

    @property
    def has_unequal_stages(self) -> bool:
        """Whether the first or the last stage has a number of layers of its own."""
        ends = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        return ends != (None, None)

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """How many of a module's layers each pipeline stage has, as Megatron deals them out.

        Raises:
            ValueError: they cannot be dealt out so.

        Example:
            >>> ModuleParallelism(
            ...     pipeline_model_parallel_size=3, num_layers_in_last_pipeline_stage=8
            ... ).layers_of_stages(32)
            [12, 12, 8]
        """
        ends = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        stages = self.pipeline_model_parallel_size
        others = stages - sum(end is not None for end in ends)
        rest = num_layers - sum(end or 0 for end in ends)
        equal = rest // max(others, 1)
        if equal * others != rest or (others and not equal):
            unequal = (
                f"of which {num_layers - rest} are in the first or last stage and {rest} remain "
                f"for {others} others: choose numbers of which those others get equally many"
            )
            even = f"which pipeline_model_parallel_size {stages} does not divide"
            raise ValueError(f"{num_layers}, {unequal if self.has_unequal_stages else even}")
        first, last = (equal if end is None else end for end in ends)
        return [first, *[equal] * (stages - 2), *[last] * (stages > 1)]

    @property
    def size(self) -> int:
        """Number of ranks: TP x CP x DP x PP."""
        return prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes in the order of :data:`DIM_NAMES`, for ``HyperCommGrid``."""
        return (
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.data_parallel_size,
            self.pipeline_model_parallel_size,
        )

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Sizes in the order of :data:`EXPERT_DIM_NAMES`: the same ranks, factored for experts."""
        expert = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        expert_dp = self.size // (expert * self.pipeline_model_parallel_size)
        return (
            self.expert_tensor_parallel_size,
            self.expert_model_parallel_size,
            expert_dp,
            self.pipeline_model_parallel_size,
        )
