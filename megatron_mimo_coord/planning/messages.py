"""What the two ends of a link send and receive at each event of the schedule, and wait for.

As the coordinator's communicator does it: ``send_forward`` does not wait until its message is
taken, but whatever comes next on the same link does; all others wait. A gradient that the sender of
an activation has no use for does not travel.
"""

from collections.abc import Mapping

from megatron_mimo_coord.planning.events import Action, channel
from megatron_mimo_coord.planning.timeline import (
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_BACKWARD_RECV_FORWARD,
    SEND_FORWARD,
    SEND_FORWARD_RECV_BACKWARD,
)

ActionsAt = Mapping[str, list[Action]]
"""For each event of the schedule, what to do."""


def ends_of_link(
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
        bridge: the encoder, if the link is its bridge.
    """
    sent, taken = ((end,) for end in channel(forward_seconds))
    gradients = () if backward_seconds is None else channel(backward_seconds)
    returned, given = gradients[:1], gradients[1:]
    outgoing = {
        kind: [
            Action(kind, sender, awaits=sent, bridge=bridge),  # what was sent before
            Action(kind, sender, posts=posts, awaits=awaits, bridge=bridge),
        ]
        for kind, posts, awaits in (
            (SEND_FORWARD, sent, ()),
            (RECV_BACKWARD, given, given),
            (SEND_FORWARD_RECV_BACKWARD, sent + given, sent + given),
        )
    }
    incoming = {
        kind: [Action(kind, receiver, posts=messages, awaits=messages, bridge=bridge)]
        for kind, messages in (
            (RECV_FORWARD, taken),
            (SEND_BACKWARD, returned),
            (SEND_BACKWARD_RECV_FORWARD, returned + taken),
        )
    }
    return outgoing, incoming
