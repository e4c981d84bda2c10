"""What the ranks of each stage do in a step, in which order, and when.

The order is that of ``forward_backward_pipelining_without_interleaving`` of Megatron-Core 0.19, the
messages are the coordinator's communicator's: ``send_forward`` does not wait until its message is
taken, but whatever comes next between the same stages does; all others wait. A gradient that the
sender of an activation has no use for does not travel. A message is on its way from when sender and
receiver are both there: so does gloo send, and NCCL whatever does not fit into its buffers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from attrs import define, field

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
    Span,
    StageShares,
)

IDLE = "idle"

Message = tuple[list[float], list[float], float]
"""When ranks at this end were there for each message, when those at the other; its seconds."""
Channel = tuple[Message, Message]
"""As the sender sees it, and as the receiver does."""


def channel(seconds: float) -> Channel:
    """Messages from one stage to another, one after the other."""
    sender, receiver = list[float](), list[float]()
    return (sender, receiver, seconds), (receiver, sender, seconds)


class Action(NamedTuple):
    """One thing that ranks do: they compute, or they are there for messages.

    Args:
        kind: the kind of ``Span`` that it becomes.
        module: for which module.
        seconds: how long it takes without messages.
        posts: what it begins to send and to receive, at once.
        awaits: of these channels, it waits until the last message it posted is over.
        bridge: the encoder whose bridge the messages pass.
    """

    kind: str
    module: str
    seconds: float = 0.0
    posts: tuple[Message, ...] = ()
    awaits: tuple[Message, ...] = ()
    bridge: str | None = None


@define(eq=False)
class StageRanks:
    """The ranks of one stage, of one module or of several that share their ranks.

    Args:
        modules: the modules.
        stage: index of the pipeline stage.
        actions: what they do, in order, and for which microbatch; None for what comes once a step.
        ends: when each action ended that has.
    """

    modules: Sequence[str]
    stage: int
    actions: list[tuple[Action, int | None]] = field(factory=list)
    ends: list[float] = field(factory=list)
    _has_posted: bool = False  # what the next action posts

    @property
    def now(self) -> float:
        """When the last action ended."""
        return self.ends[-1] if self.ends else 0.0

    def add(self, *actions: Action, microbatch: int | None = None) -> None:
        """Let them do more, for a microbatch."""
        self.actions += [(action, microbatch) for action in actions]

    def go_on(self) -> bool:
        """Do all that can be done; whether that was anything."""
        before, now = (len(self.ends), self._has_posted), self.now
        for index in range(len(self.ends), len(self.actions)):
            (_, _, seconds, posts, awaits, _), _ = self.actions[index]
            if not self._has_posted:
                for mine, _, _ in posts:
                    mine.append(now)
            over = now + seconds
            for mine, other, seconds in awaits:
                number = len(mine)
                if number > len(other):
                    self._has_posted = True
                    return before != (index, True)
                if number:
                    over = max(over, mine[-1] + seconds, other[number - 1] + seconds)
            self._has_posted = False
            now = over
            self.ends.append(now)
        return before[0] < len(self.actions)

    def wait_until(self, time: float) -> None:
        """Do nothing until a later time."""
        self.add(Action(IDLE, self.modules[0]))
        self.ends.append(time)

    def shares(self, module: str, seconds: float) -> StageShares:
        """What part of a step goes where for one of the modules."""
        if not seconds:
            return StageShares(busy=0.0, waiting=0.0, idle=1.0)
        busy = waiting = start = 0.0
        for (action, _), end in zip(self.actions, self.ends, strict=True):
            if action.bridge is not None:
                waiting += end - start
            elif action.module == module:
                busy += action.seconds
            start = end
        idle = max(seconds - busy - waiting, 0.0)
        return StageShares(busy / seconds, waiting / seconds, idle / seconds)

    def spans(self) -> Iterator[Span]:
        """What they did, in order."""
        start = 0.0
        for (action, microbatch), end in zip(self.actions, self.ends, strict=True):
            if end > start if action.awaits and not action.posts else action.kind != IDLE:
                stage = action.module, self.stage
                yield Span(action.kind, *stage, start, end, microbatch, action.bridge)
            start = end


def run(stages: Sequence[StageRanks]) -> None:
    """Let the ranks of all stages do all their actions.

    Raises:
        RuntimeError: some wait for each other for ever.
    """
    while sum(map(StageRanks.go_on, stages)):
        pass
    stuck = [
        f"{'/'.join(each.modules)} stage {each.stage} in {each.actions[len(each.ends)][0].kind}"
        for each in stages
        if len(each.ends) < len(each.actions)
    ]
    if stuck:
        raise RuntimeError(f"these would wait for each other for ever: {', '.join(stuck)}")


def order(num_microbatches: int, warm_up: int) -> Iterator[tuple[str, int]]:
    """All that a stage does in a step, in order: (a name in ``planning.timeline``, microbatch).

    Forwards, backwards, and what is sent or received, each come in the order of the microbatches.
    Where there is nobody to send to or receive from, the message is one of no time.

    Args:
        num_microbatches: microbatches in a step.
        warm_up: microbatches that run forward first, if there are as many: one for each stage
            behind, see :func:`megatron_mimo_coord.layout.stages_behind`.

    Example:
        >>> print(*(f"{event} {microbatch}," for event, microbatch in order(2, warm_up=1)))
        recv_forward 0, forward 0, send_forward 0, recv_forward 1, forward 1, \
send_forward_recv_backward 1, backward 0, send_backward 0, recv_backward 1, backward 1, \
send_backward 1,
    """
    first = min(warm_up, num_microbatches)
    for index in range(num_microbatches):
        if index <= first:
            yield RECV_FORWARD, index
        yield FORWARD, index
        if index < first:
            yield SEND_FORWARD, index
            continue
        yield SEND_FORWARD_RECV_BACKWARD, index
        yield BACKWARD, index - first
        is_last = index == num_microbatches - 1
        yield SEND_BACKWARD if is_last else SEND_BACKWARD_RECV_FORWARD, index - first
    for index in range(num_microbatches - first, num_microbatches):
        yield RECV_BACKWARD, index
        yield BACKWARD, index
        yield SEND_BACKWARD, index


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
