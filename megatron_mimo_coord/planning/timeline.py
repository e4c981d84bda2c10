"""What the stages of a layout do in a step, and when: simulated or measured alike."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from attrs import field, frozen

FORWARD, BACKWARD, DATA = "forward", "backward", "data"
RECV_FORWARD, SEND_FORWARD = "recv_forward", "send_forward"
RECV_BACKWARD, SEND_BACKWARD = "recv_backward", "send_backward"
SEND_FORWARD_RECV_BACKWARD = "send_forward_recv_backward"
SEND_BACKWARD_RECV_FORWARD = "send_backward_recv_forward"
TO_PREVIOUS = (RECV_FORWARD, SEND_BACKWARD, SEND_BACKWARD_RECV_FORWARD)
TO_NEXT = (SEND_FORWARD, RECV_BACKWARD, SEND_FORWARD_RECV_BACKWARD)
EXCHANGE = "exchange"
REDUCE = "reduce_gradients"
OPTIMIZER = "optimizer"

COMPUTING = (FORWARD, BACKWARD, REDUCE, OPTIMIZER)
"""What keeps a module busy; the other kinds of span pass messages."""


@frozen
class Span:
    """A time in which a stage does one thing.

    Args:
        kind: what it does: ``forward``, ``backward``, ``reduce_gradients``, ``optimizer``,
            ``exchange`` (tokens between colocated modules), ``data`` (a measured forward step until
            it calls the model), or the method of Megatron's communicator that it is in.
        module: name of the module.
        stage: index of the pipeline stage.
        start: seconds since the step began.
        end: seconds since the step began.
        microbatch: index of the microbatch that it computes, sends or receives; of the one that it
            sends where a method does both. None for what comes once a step.
        bridge: the encoder whose bridge the message passes; None for everything else.
    """

    kind: str
    module: str
    stage: int
    start: float
    end: float
    microbatch: int | None = None
    bridge: str | None = None


@frozen
class StageShares:
    """What part of a step the ranks of a stage spend on what; the three make 1.

    Args:
        busy: computing: forward, backward, reduction of gradients, optimizer.
        waiting: on a bridge: until the ranks of the other module are ready and the message is over.
        idle: nothing of this module to do: the pipeline's own bubble and messages, the end of the
            step, and on shared ranks the work of the other modules.
    """

    busy: float
    waiting: float
    idle: float


@frozen(slots=False)
class Timeline:
    """One step of a layout.

    Args:
        seconds: how long the step takes.
        stages: shares of every (module, stage).
    """

    seconds: float
    stages: Mapping[tuple[str, int], StageShares]
    _list_spans: Callable[[], Sequence[Span]] = field(repr=False, eq=False)

    @cached_property
    def spans(self) -> Sequence[Span]:
        """All that happens, stage after stage, each in order; listed when first asked for."""
        return self._list_spans()
