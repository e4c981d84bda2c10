"""When things happen that wait for each other: places that compute, and messages between them.

A message is on its way from when sender and receiver are both there. So does gloo send, and NCCL
whatever does not fit into its buffers. Who waits for it to be over is another matter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from attrs import define, field, frozen

from megatron_mimo_coord.planning.timeline import BACKWARD, EXCHANGE, FORWARD, Span, StageShares

IDLE = "idle"


class End(list[float]):
    """One end of a channel: when its place was there for each message, in order.

    Attributes:
        waiting: the place at the other end, if it can go no further without the next message.
    """

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: Place | None = None


@frozen
class Channel:
    """Messages from one place to another, one after the other.

    Args:
        seconds: how long a message takes.
    """

    seconds: float
    _sender: End = field(factory=End, init=False)
    _receiver: End = field(factory=End, init=False)

    def send(self) -> "Message":
        """The next message, for the place that sends."""
        return self._sender, self._receiver, self.seconds

    def receive(self) -> "Message":
        """The next message, for the place that receives."""
        return self._receiver, self._sender, self.seconds


Message = tuple[End, End, float]
"""This place's end of a channel, the other place's, and the seconds of a message."""


@frozen(eq=False)
class Task:
    """One thing that a place does: it computes, or it is there for messages.

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
class Place:
    """The ranks of one stage, of one module or of several that share their ranks.

    Args:
        modules: the modules.
        stage: index of the pipeline stage.
        tasks: what it does, in order.
        ends: when each task ended that has.
    """

    modules: Sequence[str]
    stage: int
    tasks: list[Task] = field(factory=list)
    ends: list[float] = field(factory=list)
    _has_posted: bool = False  # what the next task posts

    @property
    def now(self) -> float:
        """When the last task ended."""
        return self.ends[-1] if self.ends else 0.0

    def go_on(self) -> "list[Place]":
        """Do all that can be done; returns the places that waited for it."""
        now, tasks, ends = self.now, self.tasks, self.ends
        released: list[Place] = []
        while len(ends) < len(tasks):
            task = tasks[len(ends)]
            over = now + task.seconds
            if task.posts and not self._has_posted:
                self._has_posted = True
                for mine, _, _ in task.posts:
                    mine.append(now)
                    if mine.waiting is not None:
                        released.append(mine.waiting)
                        mine.waiting = None
            for mine, other, seconds in task.awaits:
                last = len(mine) - 1
                if last >= len(other):
                    other.waiting = self
                    return released
                if last >= 0:
                    begun = mine[last] if mine[last] > other[last] else other[last]
                    if begun + seconds > over:
                        over = begun + seconds
            self._has_posted = False
            now = over
            ends.append(now)
        return released

    def wait_until(self, time: float) -> None:
        """Do nothing until a later time."""
        self.tasks.append(Task(IDLE, self.modules[0]))
        self.ends.append(time)

    def shares(self, module: str, seconds: float) -> StageShares:
        """What part of a step goes where for one of the modules."""
        if not seconds:
            return StageShares(busy=0.0, waiting=0.0, idle=1.0)
        busy = waiting = start = 0.0
        for task, end in zip(self.tasks, self.ends, strict=True):
            if task.bridge is not None:
                waiting += end - start
            elif task.module == module:
                busy += task.seconds
            start = end
        idle = max(seconds - busy - waiting, 0.0)
        return StageShares(busy / seconds, waiting / seconds, idle / seconds)

    def spans(self) -> Iterator[Span]:
        """What it did, in order."""
        done = {FORWARD: Counter[str](), BACKWARD: Counter[str]()}  # of each module
        start = 0.0
        for task, end in zip(self.tasks, self.ends, strict=True):
            microbatch: int | None = None
            verb, *_ = words = task.kind.split("_")
            if way := next((each for each in words if each in done), None):
                microbatch = done[way][task.module] - (verb == "send")
            elif task.kind == EXCHANGE:
                forward, backward = (done[each][task.module] for each in done)
                microbatch = forward - (forward > backward)
            if task.kind in done:
                done[task.kind][task.module] += 1
            if end > start if task.awaits and not task.posts else task.kind != IDLE:
                place = task.module, self.stage
                yield Span(task.kind, *place, start, end, microbatch, task.bridge)
            start = end


def run(places: Sequence[Place]) -> None:
    """Let all places do all their tasks.

    Raises:
        RuntimeError: places wait for each other for ever.
    """
    ready = list(places)
    while ready:
        ready += ready.pop().go_on()
    stuck = [place for place in places if len(place.ends) < len(place.tasks)]
    if stuck:
        waits = ", ".join(
            f"{'/'.join(place.modules)} stage {place.stage} in {place.tasks[len(place.ends)].kind}"
            for place in stuck
        )
        raise RuntimeError(f"these would wait for each other for ever: {waits}")
