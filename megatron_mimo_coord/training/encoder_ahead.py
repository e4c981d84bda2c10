"""Frozen encoders on ranks of their own encode the next step's microbatches while this step ends.

They have no backward: once their last output is sent they would wait, in the sum of token counts or
in the optimizer's norm, until the language model has come to the end of the step, which would then
wait for their first output. What they encode instead is launched before those collectives, on the
same stream, and sent in the next step. So all ranks launch in the same order as ever.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import frozen

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.gradients.texts_read import TextsRead
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.schedule import run_encoders


@frozen
class _Encoded:
    """A microbatch of a later step: what the encoders made of it, how it was assigned, its text."""

    outputs: Any
    assignments: Sequence[ImageAssignment]
    texts: list[Any]


class EncoderAhead:
    """Runs the forward step of this rank's encoders ahead of the schedule."""

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        assignments: PendingAssignments,
        texts: TextsRead,
    ) -> None:
        self._texts = texts
        self._modules = modules
        self._assignments = assignments
        self._waiting: dict[int, tuple[Any, deque[_Encoded]]] = {}  # by the iterator's id
        self._versions: list[int] = []
        self._encode: Callable[[], None] | None = None

    def problems(self) -> list[str]:
        """What keeps a checkpoint from being saved or loaded now."""
        waiting = sum(len(queue) for _, queue in self._waiting.values())
        if not waiting:
            return []
        return [
            f"the encoders {', '.join(self._modules)} are {waiting} microbatches ahead, and so are "
            f"their data and random states: pass encoder_ahead=0 to forward_backward_func in the "
            f"step before a checkpoint is saved or weights are loaded"
        ]

    @contextmanager
    def step(
        self, most: int, forward_step_func: Callable[..., Any], data_iterator: Any, **arguments: Any
    ) -> Iterator[Callable[..., Any]]:
        """Inside, the schedule runs, with what is yielded as its forward step.

        :meth:`encode`, called before the last backward, encodes ``most`` microbatches at most.
        """
        source = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        communicator = arguments["p2p_communicator"]
        if most and not arguments["forward_only"] and self._can_run_ahead(communicator):
            number = arguments["num_microbatches"]
            run = partial(
                run_encoders,
                forward_step_func,
                source,
                arguments["model"][0],
                communicator.config,
                num_microbatches=number,
            )
            self._encode = lambda: self._run_ahead(most, source, lambda at: run(at % number))

        def forward_step(source: Any, *rest: Any) -> Any:
            encoded = self._next(source)
            if encoded is None:
                return forward_step_func(source, *rest)
            return encoded.outputs, None  # the loss function is the last stage's

        try:
            yield forward_step if id(source) in self._waiting else forward_step_func
        finally:
            self._encode = None

    def encode(self) -> None:
        """Run ahead, if a step is under way that asks for it and this rank's encoders can."""
        if self._encode is not None:
            self._encode()

    def _can_run_ahead(self, communicator: Any) -> bool:
        """Whether nothing is trained here, and nothing arrives from another rank."""
        return (
            LANGUAGE not in self._modules
            and communicator.is_pp_first_stage
            and not any(param.requires_grad for param in self._parameters())
        )

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        for module in self._modules.values():
            yield from module.parameters()

    def _run_ahead(self, most: int, source: Any, run: Callable[[int], Any]) -> None:
        self._versions = [param._version for param in self._parameters()]
        _, queue = self._waiting.setdefault(id(source), (source, deque()))
        while len(queue) < most:
            try:
                with self._texts.later() as read:
                    outputs = run(len(queue))
            except StopIteration:  # there is no later step
                break
            taken = filter(None, map(self._assignments.take, self._modules))
            queue.append(_Encoded(outputs, [*taken], read))
        if not queue:
            del self._waiting[id(source)]

    def _next(self, source: Any) -> _Encoded | None:
        """What was encoded of the next microbatch of an iterator, if it was."""
        if id(source) not in self._waiting:
            return None
        if self._versions != [param._version for param in self._parameters()]:
            raise RuntimeError(
                f"weights of {', '.join(self._modules)} were changed when their encoders had run "
                f"ahead: pass encoder_ahead=0 to forward_backward_func in the step before"
            )
        _, queue = self._waiting[id(source)]
        encoded = queue.popleft()
        self._assignments.begin_forward()
        self._texts.put_back(encoded.texts)
        if not queue:
            del self._waiting[id(source)]
        for each in encoded.assignments:
            self._assignments.put_back(each)
        return encoded
