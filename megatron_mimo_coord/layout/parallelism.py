"""The parallel sizes of one module, as a user writes them down."""

from collections.abc import Callable
from math import prod
from typing import Any

from attrs import Attribute, Converter, field, frozen

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

MAX_RANKS = 2**31
"""No job has more: a larger number is a slip of the pen."""


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer that can count ranks or samples."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and least <= value < MAX_RANKS


def shown(value: Any) -> str:
    """What a user gave, as far as it can be printed.

    Example:
        >>> shown("four"), shown(10**99)
        ("'four'", 'an integer of 329 bits')
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def must_be(is_good: Callable[[Any], bool], what: str, cure: str) -> Any:
    """A validator of an attrs field that says what was given, what is needed and what to change.

    Args:
        is_good: whether a value will do.
        what: what the field must be.
        cure: what to do about it.
    """

    def check(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
        if not is_good(value):
            raise ValueError(f"{attribute.name} must be {what}, got {shown(value)}; {cure}")

    return check


_positive = must_be(
    is_count,
    "a positive integer below 2**31",
    "write a number of ranks, or leave it out for the default",
)
_offset = must_be(
    lambda value: value is None or is_count(value, least=0),
    "a rank, 0 or more and below 2**31",
    "write the module's first rank, or leave it out to pack it behind those before",
)


def _same_as_tensor_parallel(size: Any, module: Any) -> Any:
    return module.tensor_model_parallel_size if size is None else size


@frozen(kw_only=True)
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

    Raises:
        ValueError: a size is not a positive integer, or TP x CP x DP ranks of a pipeline stage
            cannot be divided among expert TP x EP.

    Example:
        >>> ModuleParallelism(tensor_model_parallel_size=2, data_parallel_size=4).size
        8
    """

    tensor_model_parallel_size: int = field(default=1, validator=_positive)
    context_parallel_size: int = field(default=1, validator=_positive)
    pipeline_model_parallel_size: int = field(default=1, validator=_positive)
    data_parallel_size: int = field(default=1, validator=_positive)
    expert_model_parallel_size: int = field(default=1, validator=_positive)
    expert_tensor_parallel_size: int = field(
        default=None,
        converter=Converter(_same_as_tensor_parallel, takes_self=True),  # type: ignore[misc]
        validator=_positive,
    )
    rank_offset: int | None = field(default=None, validator=_offset)

    def __attrs_post_init__(self) -> None:
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
