"""The order of Megatron's 1F1B schedule: what a stage computes, sends and receives, and when.

The source is ``forward_backward_pipelining_without_interleaving`` of Megatron-Core 0.19.
"""

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


def order(num_microbatches: int, warm_up: int) -> list[str]:
    """All that a stage does in a step, in order: the names in ``planning.timeline``.

    Forwards, backwards, and what is sent or received, each come in the order of the microbatches.
    Where there is nobody to send to or receive from, the message is one of no time.

    Args:
        num_microbatches: microbatches in a step.
        warm_up: microbatches that run forward first, if there are as many: one for each stage
            behind, see :func:`megatron_mimo_coord.layout.stages_behind`.

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
