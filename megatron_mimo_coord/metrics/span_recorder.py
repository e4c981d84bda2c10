"""What one rank does in a step, span after span, as it happens."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated, runs_encoders_first
from megatron_mimo_coord.metrics.clocks import Clock
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    DATA,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD_RECV_FORWARD,
    SEND_FORWARD_RECV_BACKWARD,
    TO_NEXT,
    TO_PREVIOUS,
    Span,
)

FINALIZE = "finalize"
"""All of ``finalize_model_grads``; what it waits for a module's reductions is ``REDUCE``."""

# What the schedule does once a method of the communicator has returned: a forward step first reads
# its batch.
_NEXT = {
    RECV_FORWARD: DATA,
    SEND_BACKWARD_RECV_FORWARD: DATA,
    RECV_BACKWARD: BACKWARD,
    SEND_FORWARD_RECV_BACKWARD: BACKWARD,
}


@frozen
class Place:
    """Where a rank stands in the pipeline.

    Args:
        modules: the modules on this rank that are in the pipeline, in the order of forward.
        stage: their pipeline stage.
        bridges: for each kind of message that passes a bridge here, the encoder whose it is.
    """

    modules: Sequence[str]
    stage: int
    bridges: dict[str, str]

    @classmethod
    def of(cls, rank: int, grids: Mapping[str, ModuleGrid], modules: Sequence[str]) -> "Place":
        """That of a rank.

        Args:
            rank: the rank.
            grids: where each module lies.
            modules: those on this rank.
        """
        encoders_first = runs_encoders_first(grids)
        if encoders_first:
            modules = [LANGUAGE]
        grid = grids[modules[0]]
        stage = grid.coordinate(rank, "pp")
        bridges: dict[str, str] = {}
        if not is_colocated(grids.values()) and not encoders_first:
            if LANGUAGE not in modules and grid.is_on_last_stage(rank):
                bridges = dict.fromkeys(TO_NEXT, modules[0])
            elif LANGUAGE in modules and stage == 0:
                encoders = [name for name in grids if name != LANGUAGE]
                bridges = dict.fromkeys(TO_PREVIOUS, ", ".join(encoders))
        return cls(modules=modules, stage=stage, bridges=bridges)


class SpanRecorder:
    """Records the spans of one rank in a step, which begins now.

    Args:
        place: where the rank stands.
        clock: of the rank's device.
    """

    def __init__(self, place: Place, clock: Clock) -> None:
        self._place = place
        self._clock = clock
        self._marked: list[tuple[str, str, int | None, Any, Any]] = []
        self._computing: tuple[str, str, int, Any] | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._start = clock.mark()

    @contextmanager
    def message(self, kind: str) -> Iterator[None]:
        """Around a method of the communicator; what follows it is computing."""
        self.stop_computing()
        start = self._clock.mark()
        yield
        module = self._place.modules[0]
        verb, way, *_ = kind.split("_")  # of what it sends where it does both
        microbatch = self._counts[way, module] - (verb == "send")
        self._marked.append((kind, module, microbatch, start, self._clock.mark()))
        if kind in _NEXT:
            # Autograd begins with what comes last; encoders alone go backward one by one.
            is_reversed = _NEXT[kind] == BACKWARD and LANGUAGE in self._place.modules
            self.compute(_NEXT[kind], self._place.modules[-1 if is_reversed else 0])

    def compute(self, kind: str, module: str) -> None:
        """From here on the rank is in ``FORWARD`` or ``BACKWARD`` of a module, or in ``DATA``."""
        if self._computing is not None and self._computing[:2] == (kind, module):
            return
        self.stop_computing()
        microbatch = self._counts[kind, module]
        self._counts[kind, module] += 1
        self._computing = kind, module, microbatch, self._clock.mark()

    def calls_model(self) -> None:
        """The forward step has read its batch."""
        if self._computing is not None and self._computing[0] == DATA:
            self.compute(FORWARD, self._place.modules[0])

    def stop_computing(self) -> None:
        """Forward or backward is over."""
        if self._computing is not None:
            self._marked.append((*self._computing, self._clock.mark()))
            self._computing = None

    @contextmanager
    def once(self, kind: str, module: str) -> Iterator[None]:
        """Around what a step does once."""
        self.stop_computing()
        start = self._clock.mark()
        yield
        self._marked.append((kind, module, None, start, self._clock.mark()))

    def spans(self) -> list[Span]:
        """All spans since the step began; waits for the device."""
        self.stop_computing()
        begin = self._clock.seconds(self._start)
        return [
            Span(
                kind=kind,
                module=module,
                stage=self._place.stage if module in self._place.modules else 0,
                start=self._clock.seconds(start) - begin,
                end=self._clock.seconds(end) - begin,
                microbatch=microbatch,
                bridge=self._place.bridges.get(kind),
            )
            for kind, module, microbatch, start, end in self._marked
        ]
