"""Megatron's 1F1B schedule: what a stage computes, sends and receives, in which order.

The order is that of ``forward_backward_pipelining_without_interleaving`` of Megatron-Core 0.19, the
messages are the coordinator's communicator's: ``send_forward`` does not wait until its message is
taken, but whatever comes next between the same stages does; all others wait. A gradient that the
sender of an activation has no use for does not travel.
"""

from collections.abc import Mapping

from megatron_mimo_coord.planning.events import Action, channel
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_BACKWARD_RECV_FORWARD,
    SEND_FORWARD,
    SEND_FORWARD_RECV_BACKWARD,
    TO_NEXT,
    TO_PREVIOUS,
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


ActionsAt = Mapping[str, list[Action]]
"""For each event of the schedule, what to do."""


def actions_of_ends(
    sender: str,
    receiver: str,
    forward_seconds: float,
    backward_seconds: float | None,
    bridge: str | None = None,
) -> tuple[ActionsAt, ActionsAt]:
    """What the stage that sends activations does, and the one that receives them.

    Args:
        sender: its module.
        receiver: its module.
        forward_seconds: of a message with activations.
        backward_seconds: of a message with gradients; None if no gradient is wanted.
        bridge: the encoder, if messages pass its bridge.
    """
    sent, taken = channel(forward_seconds)
    mine, theirs = {SEND_FORWARD: sent}, {RECV_FORWARD: taken}
    if backward_seconds is not None:
        theirs[SEND_BACKWARD], mine[RECV_BACKWARD] = channel(backward_seconds)
    outgoing, incoming = {}, {}
    for kind in TO_NEXT:
        posts = tuple(mine[part] for part in mine if part in kind)
        awaits = () if kind == SEND_FORWARD else posts
        outgoing[kind] = [
            Action(kind, sender, awaits=(sent,), bridge=bridge),  # what was sent before
            Action(kind, sender, posts=posts, awaits=awaits, bridge=bridge),
        ]
    for kind in TO_PREVIOUS:
        posts = tuple(theirs[part] for part in theirs if part in kind)
        incoming[kind] = [Action(kind, receiver, posts=posts, awaits=posts, bridge=bridge)]
    return outgoing, incoming
