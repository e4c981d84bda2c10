"""When things happen that wait for each other: ranks that compute, and messages between them.

A message is on its way from when sender and receiver are both there. So does gloo send, and NCCL
whatever does not fit into its buffers. Who waits for it to be over is another matter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attrs import define, field

from megatron_mimo_coord.planning.timeline import BACKWARD, EXCHANGE, FORWARD, Span, StageShares

IDLE = "idle"


class End(list[float]):
    """One end of a channel: when its ranks were there for each message, in order.

    Attributes:
        waiting: the ranks at the other end, if they can go no further without the next message.
    """

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: StageRanks | None = None


Message = tuple[End, End, float]
"""This side's end of a channel, the other's, and the seconds of a message."""


def channel(seconds: float) -> tuple[Message, Message]:
    """Messages from one stage to another, one after the other: for the sender and the receiver."""
    sender, receiver = End(), End()
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
        actions: what they do, in order.
        ends: when each action ended that has.
    """

    modules: Sequence[str]
    stage: int
    actions: list[Action] = field(factory=list)
    ends: list[float] = field(factory=list)
    _has_posted: bool = False  # what the next action posts

    @property
    def now(self) -> float:
        """When the last action ended."""
        return self.ends[-1] if self.ends else 0.0

    def go_on(self) -> "list[StageRanks]":
        """Do all that can be done; returns the ranks that waited for it."""
        now, actions, ends = self.now, self.actions, self.ends
        released: list[StageRanks] = []
        for index in range(len(ends), len(actions)):
            _, _, seconds, posts, awaits, _ = actions[index]
            over = now + seconds
            if posts and not self._has_posted:
                self._has_posted = True
                for mine, _, _ in posts:
                    mine.append(now)
                    if mine.waiting is not None:
                        released.append(mine.waiting)
                        mine.waiting = None
            for mine, other, seconds in awaits:
                number = len(mine)
                if number > len(other):
                    other.waiting = self
                    return released
                if number:
                    over = max(over, mine[-1] + seconds, other[number - 1] + seconds)
            self._has_posted = False
            now = over
            ends.append(now)
        return released

    def wait_until(self, time: float) -> None:
        """Do nothing until a later time."""
        self.actions.append(Action(IDLE, self.modules[0]))
        self.ends.append(time)

    def shares(self, module: str, seconds: float) -> StageShares:
        """What part of a step goes where for one of the modules."""
        if not seconds:
            return StageShares(busy=0.0, waiting=0.0, idle=1.0)
        busy = waiting = start = 0.0
        for action, end in zip(self.actions, self.ends, strict=True):
            if action.bridge is not None:
                waiting += end - start
            elif action.module == module:
                busy += action.seconds
            start = end
        idle = max(seconds - busy - waiting, 0.0)
        return StageShares(busy / seconds, waiting / seconds, idle / seconds)

    def spans(self) -> Iterator[Span]:
        """What they did, in order."""
        done = {FORWARD: Counter[str](), BACKWARD: Counter[str]()}  # of each module
        start = 0.0
        for action, end in zip(self.actions, self.ends, strict=True):
            microbatch: int | None = None
            verb, *_ = words = action.kind.split("_")
            if way := next((each for each in words if each in done), None):
                microbatch = done[way][action.module] - (verb == "send")
            elif action.kind == EXCHANGE:
                forward, backward = (done[each][action.module] for each in done)
                microbatch = forward - (forward > backward)
            if action.kind in done:
                done[action.kind][action.module] += 1
            if end > start if action.awaits and not action.posts else action.kind != IDLE:
                stage = action.module, self.stage
                yield Span(action.kind, *stage, start, end, microbatch, action.bridge)
            start = end


def run(stages: Sequence[StageRanks]) -> None:
    """Let the ranks of all stages do all their actions.

    Raises:
        RuntimeError: some wait for each other for ever.
    """
    ready = list(stages)
    while ready:
        ready += ready.pop().go_on()
    stuck = [
        f"{'/'.join(each.modules)} stage {each.stage} in {each.actions[len(each.ends)].kind}"
        for each in stages
        if len(each.ends) < len(each.actions)
    ]
    if stuck:
        raise RuntimeError(f"these would wait for each other for ever: {', '.join(stuck)}")
