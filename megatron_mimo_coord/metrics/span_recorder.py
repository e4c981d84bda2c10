"""What one rank does in a step, span after span, as it happens."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated, runs_encoders_first
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
from megatron_mimo_coord.world.device import world_device

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
        """That of a rank which holds ``modules``."""
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
    """Records the spans of one rank, between the beginning and the end of each step.

    Args:
        place: where the rank stands.

    Attributes:
        in_step: whether a step is under way.
    """

    def __init__(self, place: Place) -> None:
        self.in_step = False
        self._place = place
        self._on_gpu = world_device().type == "cuda"
        # Of each step when it began, and (kind, module, microbatch, start, end).
        self._steps: list[tuple[Any, list[tuple[str, str, int | None, Any, Any]]]] = []
        self._computing: tuple[str, str, int, Any] | None = None
        self._counts: Counter[tuple[str, str]] = Counter()

    def begin_step(self) -> None:
        """What runs from now on belongs to a step, the next one."""
        self.stop_computing()
        self._counts.clear()
        self._steps.append((self._now(), []))
        self.in_step = True

    def end_step(self) -> None:
        """What runs from now on belongs to no step: a trainer may evaluate."""
        self.stop_computing()
        self.in_step = False

    @contextmanager
    def message(self, kind: str) -> Iterator[None]:
        """Around a method of the communicator; what follows it is computing."""
        modules = self._place.modules
        verb, way, *_ = kind.split("_")  # of what it sends where it does both
        with self.once(kind, modules[0], self._counts[way, modules[0]] - (verb == "send")):
            yield
        if kind in _NEXT:
            # Autograd begins with what comes last; encoders alone go backward one by one.
            is_reversed = _NEXT[kind] == BACKWARD and LANGUAGE in modules
            self.compute(_NEXT[kind], modules[-1 if is_reversed else 0])

    @contextmanager
    def once(self, kind: str, module: str, microbatch: int | None = None) -> Iterator[None]:
        """Around what a step does once, or once a microbatch."""
        if not self.in_step:
            yield
            return
        self.stop_computing()
        _, marked = self._steps[-1]
        start = self._now()
        yield
        marked.append((kind, module, microbatch, start, self._now()))

    def compute(self, kind: str, module: str) -> None:
        """From here on the rank is in ``FORWARD`` or ``BACKWARD`` of a module, or in ``DATA``."""
        if module not in self._place.modules:  # one microbatch of it follows another
            self.stop_computing()
        is_same = self._computing is not None and self._computing[:2] == (kind, module)
        if self.in_step and not is_same:
            self.stop_computing()
            self._computing = kind, module, self._counts[kind, module], self._now()
            self._counts[kind, module] += 1

    def calls_model(self) -> None:
        """The forward step has read its batch."""
        if self._computing is not None and self._computing[0] == DATA:
            self.compute(FORWARD, self._place.modules[0])

    def stop_computing(self) -> None:
        """Forward or backward is over."""
        if self._computing is not None:
            _, marked = self._steps[-1]
            marked.append((*self._computing, self._now()))
            self._computing = None

    def steps(self) -> list[list[Span]]:
        """The spans of each step; waits for the device."""
        return [
            [
                Span(
                    kind=kind,
                    module=module,
                    stage=self._place.stage if module in self._place.modules else 0,
                    start=self._seconds(began, start),
                    end=self._seconds(began, end),
                    microbatch=microbatch,
                    bridge=self._place.bridges.get(kind),
                )
                for kind, module, microbatch, start, end in marked
            ]
            for began, marked in self._steps
        ]

    def _now(self) -> Any:
        """This moment of the device's work; on a GPU an event, and the host does not wait."""
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        """From one moment to another; waits for the device."""
        if not self._on_gpu:
            return float(end - start)
        start.synchronize()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
