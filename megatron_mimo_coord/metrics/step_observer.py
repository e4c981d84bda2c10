"""What this rank does in a step: messages, forward and backward of each module, what is once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from attrs import asdict, astuple

from megatron_mimo_coord.bridges.communicator import PipelineCommunicator
from megatron_mimo_coord.gradients import profiler_ranges
from megatron_mimo_coord.gradients.finalize import WHOLE_FINALIZE
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp
from megatron_mimo_coord.megatron.forwards import named
from megatron_mimo_coord.megatron.optimizers import updates
from megatron_mimo_coord.metrics.measured_costs import RankBytes
from megatron_mimo_coord.metrics.span_recorder import FINALIZE, Place, SpanRecorder
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    REDUCE,
    TO_NEXT,
    TO_PREVIOUS,
)


class StepObserver:
    """Watches a model, its communicators and its optimizer, from :meth:`start` to :meth:`stop`.

    Args:
        place: where this rank stands.
        model: the model.
        ddps: the modules on this rank.
        communicators: the schedule's.
        optimizer: Megatron's, if there is one.

    Attributes:
        recorder: is to be told where a step begins and ends.
    """

    def __init__(
        self,
        place: Place,
        model: torch.nn.Module,
        ddps: Mapping[str, ModuleDdp],
        communicators: Sequence[PipelineCommunicator],
        optimizer: Any,
    ) -> None:
        self._place = place
        self._model = model
        self._ddps = ddps
        self._communicators = communicators
        self._updates = updates(optimizer, ddps) if optimizer is not None else {}
        self.recorder = SpanRecorder(place)
        self._sent: Counter[str] = Counter()
        self._input_shape = (0, 0)
        self._changes = Changes()

    def start(self) -> None:
        """Record what runs from now on, inside of steps."""
        changes = self._changes = Changes()
        for communicator in self._communicators:
            for kind in (*TO_PREVIOUS, *TO_NEXT):
                _around(communicator, kind, partial(self._message, kind), changes)
        for name, (optimizer, update) in self._updates.items():
            updating = partial(self.recorder.once, OPTIMIZER, name)
            _around(optimizer, update, lambda *_, updating=updating: updating(), changes)
        profiler_ranges.observers.append(self._range)
        changes.on_close(partial(profiler_ranges.observers.remove, self._range))
        changes.on_close(
            self._model.register_forward_pre_hook(self._begin_forward, with_kwargs=True).remove
        )
        if len(self._ddps) > 1 or not self._communicators:
            for name, module in self._ddps.items():
                # MimoModel calls some modules by their forward, past PyTorch's own hooks.
                _around(module.ddp, "forward", partial(self._forward, name), changes)

    def stop(self) -> None:
        """Leave no trace of it."""
        self._changes.close()
        self.recorder.end_step()

    def observed(self) -> dict[str, Any]:
        """What this rank did, as plain data; waits for the device."""
        steps = self.recorder.steps()
        gradients = {name: ddp.gradient_bytes for name, ddp in self._ddps.items()}
        sizes = RankBytes(
            dense_gradients={name: dense for name, (dense, _) in gradients.items()},
            expert_gradients={name: expert for name, (_, expert) in gradients.items()},
            sent_forward={name: sent / len(steps) for name, sent in self._sent.items()},
            shards_optimizer=[
                name for name, ddp in self._ddps.items() if ddp.settings.use_distributed_optimizer
            ],
        )
        return {
            "steps": [[astuple(span) for span in spans] for spans in steps],
            "bytes": asdict(sizes),
            "input_shape": self._input_shape,
        }

    # -- what is observed --------------------------------------------------------------------------

    def _message(self, kind: str, *tensors: Any) -> AbstractContextManager[None]:
        if kind.startswith("send_forward") and tensors:
            sent = tensors[0]
            if not isinstance(sent, Mapping):
                sent = {self._place.modules[-1]: sent}
            for name, output in sent.items():
                self._count(name, output)
        return self.recorder.message(kind)

    def _count(self, name: str, output: Any) -> None:
        """What an encoder or a stage has sent on."""
        if self.recorder.in_step:
            self._sent[name] += _nbytes(output)

    def _range(self, name: str) -> AbstractContextManager[None]:
        """The finalize and each module's part of it, which are named ranges."""
        if name == WHOLE_FINALIZE:
            return self.recorder.once(FINALIZE, self._place.modules[0])
        return self.recorder.once(REDUCE, name) if name in self._ddps else nullcontext()

    def _begin_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.recorder.calls_model()
        input_ids = named(args, kwargs).get("input_ids")
        if input_ids is not None:
            self._input_shape = tuple(input_ids.shape[:2])

    @contextmanager
    def _forward(self, name: str, *_: Any) -> Iterator[Callable[[Any], None]]:
        """Around a module's forward; its backward begins when its output has a gradient."""

        def watch(output: Any) -> None:
            if LANGUAGE in self._ddps and name != LANGUAGE:
                self._count(name, output)  # past the schedule's communicator
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(lambda grad: self.recorder.compute(BACKWARD, name))

        self.recorder.compute(FORWARD, name)
        yield watch
        if name not in self._place.modules:
            self.recorder.stop_computing()


def _around(
    owner: Any,
    name: str,
    context: Callable[..., AbstractContextManager[Callable[[Any], None] | None]],
    changes: Changes,
) -> None:
    """Run a method of an object inside a context, which may look at what it returns."""
    method = getattr(owner, name)

    @wraps(method)
    def observed(*args: Any, **kwargs: Any) -> Any:
        with context(*args) as look_at:
            result = method(*args, **kwargs)
            if look_at is not None:
                look_at(result)
        return result

    changes.set(owner, name, observed)


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in what is handed to a communicator."""
    if torch.is_tensor(value):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
