"""The order of Megatron's 1F1B schedule: what a stage computes, sends and receives, and when.

The source is ``forward_backward_pipelining_without_interleaving`` of Megatron-Core 0.19 and the
number of warm-up microbatches that its ``MultiModulePipelineCommunicator`` asks for.
"""

from collections.abc import Mapping

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_BACKWARD_RECV_FORWARD,
    SEND_FORWARD,
    SEND_FORWARD_RECV_BACKWARD,
)


def warm_up(grids: Mapping[str, ModuleGrid], module: str, stage: int) -> int:
    """Microbatches that a stage runs forward before its first backward, if there are as many.

    As many as stages come behind it on the longest way: the deepest encoder's, then the language
    model's. So an encoder with fewer stages than the deepest runs ahead further than it need.

    Example:
        >>> grids = {
        ...     "vision": ModuleGrid("vision", (2,), ("pp",)),
        ...     "audio": ModuleGrid("audio", (1,), ("pp",), rank_offset=2),
        ...     "language": ModuleGrid("language", (2,), ("pp",), rank_offset=3),
        ... }
        >>> [warm_up(grids, "vision", 0), warm_up(grids, "audio", 0), warm_up(grids, "language", 0)]
        [3, 3, 1]
    """
    if is_colocated(grids.values()):
        return grids[module].dim("pp") - stage - 1
    encoders = max((grid.dim("pp") for name, grid in grids.items() if name != LANGUAGE), default=0)
    total = encoders + grids[LANGUAGE].dim("pp")
    return total - stage - 1 - (encoders if module == LANGUAGE else 0)


def order(num_microbatches: int, warm_up: int) -> list[str]:
    """All that a stage does in a step, in order: the names in ``planning.timeline``.

    Forwards, backwards, and what is sent or received, each come in the order of the microbatches.
    Where there is nobody to send to or receive from, the message is one of no time.

    Args:
        num_microbatches: microbatches in a step.
        warm_up: microbatches that run forward first, if there are as many.

    Example:
        >>> print(*order(2, warm_up=1))
        recv_forward forward send_forward recv_forward forward send_forward_recv_backward backward \
send_backward recv_backward backward send_backward
    """
    first = min(warm_up, num_microbatches)
    rest = num_microbatches - first
    steady = [FORWARD, SEND_FORWARD_RECV_BACKWARD, BACKWARD, SEND_BACKWARD_RECV_FORWARD] * rest
    if rest:
        steady = [RECV_FORWARD, *steady]
        steady[-1] = SEND_BACKWARD
    return [
        *([RECV_FORWARD, FORWARD, SEND_FORWARD] * first),
        *steady,
        *([RECV_BACKWARD, BACKWARD, SEND_BACKWARD] * first),
    ]
