"""What sharing sequences out wants of a module's weights."""

from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.parameters import unmarked_weights

CURE = (
    "set parameter.sequence_parallel = True where it is applied to a part of the sequence, so that "
    "its gradient is summed over tensor-parallel ranks, or False where to the whole"
)


def weight_problems(name: str, ddp: DistributedDataParallel) -> list[str]:
    """A sentence if the gradient of a weight would be a part of what it is."""
    inside = [weight for weight, is_inside in unmarked_weights(ddp) if is_inside]
    if not inside:
        return []
    return [
        f"module {name!r} is sequence-parallel, and its replicated weights {listed(inside)} do not "
        f"say what they are applied to: their gradients would be wrong; {CURE}"
    ]


def weight_remark(name: str, ddp: DistributedDataParallel) -> str:
    """What to look at: weights of which nobody says whether they see the whole sequence."""
    outside = [weight for weight, is_inside in unmarked_weights(ddp) if not is_inside]
    if not outside:
        return ""
    return (
        f"module {name} is sequence-parallel, and its replicated weights {listed(outside)} are "
        f"taken to see the whole sequence; else {CURE}"
    )
