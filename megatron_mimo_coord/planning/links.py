"""What a stage sends and receives over one link at each event of the schedule, and waits for.

As the coordinator's communicator does it: ``send_forward`` does not wait until its message is
taken, but whatever comes next on the same link does; all others wait. A gradient that the sender of
an activation has no use for does not travel.
"""

from collections.abc import Mapping

from attrs import Factory, field, frozen

from megatron_mimo_coord.planning.events import Channel, Task
from megatron_mimo_coord.planning.timeline import (
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_BACKWARD_RECV_FORWARD,
    SEND_FORWARD,
    SEND_FORWARD_RECV_BACKWARD,
)

TasksOf = Mapping[str, list[Task]]
"""For each event of the schedule, what to do."""


@frozen
class Link:
    """From one stage to the next, or from an encoder's last stage to the language model's first.

    Args:
        forward_seconds: of a message with activations.
        backward_seconds: of a message with gradients; None if no gradient is wanted.
        bridge: the encoder, if the link is its bridge.
    """

    forward_seconds: float
    backward_seconds: float | None
    bridge: str | None = None
    _forward: Channel = field(
        init=False, default=Factory(lambda self: Channel(self.forward_seconds), True)
    )
    _backward: Channel = field(
        init=False, default=Factory(lambda self: Channel(self.backward_seconds or 0.0), True)
    )

    def outgoing(self, module: str) -> TasksOf:
        """For the stage of a module that sends activations."""
        sent = (self._forward.send(),)
        returned = () if self.backward_seconds is None else (self._backward.receive(),)

        return {
            kind: [
                Task(kind, module, awaits=sent, bridge=self.bridge),  # what was sent before
                Task(kind, module, posts=posts, awaits=awaits, bridge=self.bridge),
            ]
            for kind, posts, awaits in (
                (SEND_FORWARD, sent, ()),
                (RECV_BACKWARD, returned, returned),
                (SEND_FORWARD_RECV_BACKWARD, sent + returned, sent + returned),
            )
        }

    def incoming(self, module: str) -> TasksOf:
        """For the stage of a module that receives activations."""
        received = (self._forward.receive(),)
        returned = () if self.backward_seconds is None else (self._backward.send(),)
        return {
            kind: [Task(kind, module, posts=messages, awaits=messages, bridge=self.bridge)]
            for kind, messages in (
                (RECV_FORWARD, received),
                (SEND_BACKWARD, returned),
                (SEND_BACKWARD_RECV_FORWARD, returned + received),
            )
        }
