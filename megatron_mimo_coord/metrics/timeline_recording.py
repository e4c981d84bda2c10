"""What happened in a few steps, on every rank: a trace, a summary and measured costs."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated, is_count, shown
from megatron_mimo_coord.metrics import profiler_ranges
from megatron_mimo_coord.metrics.clocks import Clock, clock_of
from megatron_mimo_coord.metrics.measured_costs import RankBytes, measured_costs, to_toml
from megatron_mimo_coord.metrics.span_recorder import (
    FINALIZE,
    TO_NEXT,
    TO_PREVIOUS,
    Place,
    SpanRecorder,
)
from megatron_mimo_coord.metrics.step_summary import Step, StepSummary, step_seconds
from megatron_mimo_coord.planning.timeline import BACKWARD, FORWARD, OPTIMIZER, REDUCE, Span
from megatron_mimo_coord.planning.trace import rank_threads, write_trace
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import gather_text


class TimelineRecording:
    """Steps that are recorded, or were.

    A step begins with ``zero_grad_buffer`` and ends with the optimizer's step, or without an
    attached optimizer with ``finalize_model_grads``. At the end of the last one the ranks send
    rank 0 their spans, in one gather, and it writes the files.

    Attributes:
        summary: where the time went, on rank 0 once the last step is over; else None.
    """

    def __init__(
        self,
        *,
        rank: int,
        grids: Mapping[str, ModuleGrid],
        model: torch.nn.Module,
        ddps: Mapping[str, DistributedDataParallel],
        gradient_bytes: Mapping[str, tuple[float, float]],
        finalizer: Any,
        communicators: Sequence[Any],
        optimizer: Any,
        path: Path,
        steps: range,
        gpus_per_node: int,
        flops_per_sample: float | None,
    ) -> None:
        self.summary: StepSummary | None = None
        self._grids = grids
        self._model = model
        self._ddps = ddps
        self._gradient_bytes = gradient_bytes
        self._finalizer = finalizer
        self._communicators = communicators
        self._optimizer = optimizer
        self._path = path
        self._steps = steps
        self._gpus_per_node = gpus_per_node
        self._flops_per_sample = flops_per_sample
        self._place = _place(rank, grids, list(ddps))
        self._clock: Clock = clock_of(world_device())
        self._recorders: list[SpanRecorder] = []
        self._recorder: SpanRecorder | None = None  # of the step that is under way
        self._sent: Counter[str] = Counter()
        self._input_shape = (0, 0)
        self._begun = 0
        self._observed: list[Callable[[], None]] = []
        self._watch_steps = _around(finalizer, "zero_grad_buffer", lambda *_: self._begin_step())

    # -- steps -------------------------------------------------------------------------------------

    def _begin_step(self) -> AbstractContextManager[None]:
        if self._begun in self._steps:
            if not self._observed:
                self._observe()
            self._recorder = SpanRecorder(self._place, self._clock)
            self._recorders.append(self._recorder)
        self._begun += 1
        return nullcontext()

    def _end_step(self) -> None:
        assert self._recorder is not None, "only while a step is observed"
        self._recorder.stop_computing()
        self._recorder = None
        if self._begun == self._steps.stop:
            self._stop_observing()
            self._watch_steps()
            self._merge()

    # -- what is observed --------------------------------------------------------------------------

    def _observe(self) -> None:
        """Record what runs from now on; ``_stop_observing`` leaves no trace of it."""
        undo = self._observed
        for communicator in self._communicators:
            for kind in (*TO_PREVIOUS, *TO_NEXT):
                undo.append(_around(communicator, kind, self._message(kind)))
        undo.append(_around(self._finalizer, "finalize", lambda *_: self._finalize()))
        if self._optimizer is not None:
            undo.append(_around(self._optimizer, "step", lambda *_: self._optimizer_step()))
            for name, inner in _optimizers(self._optimizer, self._place.modules):
                update = "step_with_ready_grads" if hasattr(inner, "step_with_ready_grads") else ""
                if update:
                    undo.append(_around(inner, update, self._once(OPTIMIZER, name)))
        profiler_ranges.observers.append(self._range)
        undo.append(lambda: profiler_ranges.observers.remove(self._range))
        watch = self._model.register_forward_pre_hook(self._remember_shape, with_kwargs=True)
        undo.append(watch.remove)
        if len(self._place.modules) > 1 or not self._communicators:
            for name, ddp in self._ddps.items():
                # MimoModel calls some modules by their forward, past PyTorch's own hooks.
                undo.append(_around(ddp, "forward", self._forward_of(name), self._watch(name)))

    def _stop_observing(self) -> None:
        for undo in reversed(self._observed):
            undo()
        self._observed.clear()

    def _message(self, kind: str) -> Callable[..., AbstractContextManager[None]]:
        def around(*tensors: Any) -> AbstractContextManager[None]:
            if self._recorder is None:  # between two steps, where a trainer may evaluate
                return nullcontext()
            if kind.startswith("send_forward") and tensors:
                self._sent[self._place.modules[0]] += _nbytes(tensors[0])
            return self._recorder.message(kind)

        return around

    def _once(self, kind: str, module: str) -> Callable[..., AbstractContextManager[None]]:
        return lambda *_: self._recorder.once(kind, module) if self._recorder else nullcontext()

    @contextmanager
    def _finalize(self) -> Iterator[None]:
        with self._once(FINALIZE, self._place.modules[0])():
            yield
        if self._optimizer is None:
            self._end_step()

    @contextmanager
    def _optimizer_step(self) -> Iterator[None]:
        yield
        self._end_step()

    def _range(self, name: str) -> AbstractContextManager[None]:
        """A module's part of the finalize, which is a named range of its own."""
        return self._once(REDUCE, name)() if name in self._ddps else nullcontext()

    def _remember_shape(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None:
            self._input_shape = tuple(input_ids.shape[:2])

    def _forward_of(self, name: str) -> Callable[..., AbstractContextManager[None]]:
        def around(*_: Any) -> AbstractContextManager[None]:
            self._compute(FORWARD, name)
            return nullcontext()

        return around

    def _compute(self, kind: str, module: str) -> None:
        if self._recorder is not None:
            self._recorder.compute(kind, module)

    def _watch(self, name: str) -> Callable[[Any], None]:
        """Backward of a module begins when its output has a gradient."""

        def watch(output: Any) -> None:
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(lambda grad: self._compute(BACKWARD, name))

        return watch

    # -- what comes of it --------------------------------------------------------------------------

    def _merge(self) -> None:
        """Have rank 0 write what all ranks recorded. Collective over the world."""
        sizes = self._gradient_bytes
        mine = {
            "steps": [[list(_row(span)) for span in each.spans()] for each in self._recorders],
            "bytes": asdict(
                RankBytes(
                    dense_gradients={name: dense for name, (dense, _) in sizes.items()},
                    expert_gradients={name: expert for name, (_, expert) in sizes.items()},
                    sent_forward={
                        name: sent / len(self._recorders) for name, sent in self._sent.items()
                    },
                    shards_optimizer=[
                        name
                        for name, ddp in self._ddps.items()
                        if ddp.ddp_config.use_distributed_optimizer
                    ],
                )
            ),
            "input_shape": self._input_shape,
        }
        everything = [json.loads(text) for text in gather_text(json.dumps(mine))]
        if everything:
            self._write(everything)

    def _write(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        steps: list[Step] = [
            {rank: [Span(*row) for row in of["steps"][index]] for rank, of in enumerate(ranks)}
            for index in range(len(self._recorders))
        ]
        language = self._grids[LANGUAGE]
        rows, sequence_length = ranks[language.ranks[0]]["input_shape"]
        micro_batch_size = rows * language.data_parallel_size
        num_microbatches = sum(
            span.kind == FORWARD and span.module == LANGUAGE for span in steps[0][language.ranks[0]]
        )
        self.summary = StepSummary.of(
            steps,
            self._grids,
            samples=micro_batch_size * num_microbatches,
            sequence_length=sequence_length,
            gpus_per_node=self._gpus_per_node,
            flops_per_sample=self._flops_per_sample,
        )
        costs = measured_costs(
            steps,
            [RankBytes(**of["bytes"]) for of in ranks],
            self._grids,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.with_name("costs.toml").write_text(to_toml(costs))
        begins = accumulate((step_seconds(step) for step in steps[:-1]), initial=0.0)
        write_trace(rank_threads(zip(begins, steps, strict=True)), self._path)


def gpus_of_a_node() -> int:
    """GPUs of this rank's node, idle ones included; ranks of the node where there are none."""
    return torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def steps_to_record(steps: Any) -> range:
    """The steps that a user names, counted from now.

    Raises:
        ValueError: neither a number of steps nor a range of them.

    Example:
        >>> steps_to_record(3), steps_to_record(range(5, 8))
        (range(0, 3), range(5, 8))
    """
    if is_count(steps):
        return range(steps)
    if isinstance(steps, range) and len(steps) and steps.step == 1 and steps.start >= 0:
        return steps
    raise ValueError(
        f"steps must be how many of the next steps to record, or a range of them counted from now, "
        f"got {shown(steps)}; give 3, or range(10, 13) to let ten go by first"
    )


def _place(rank: int, grids: Mapping[str, ModuleGrid], modules: list[str]) -> Place:
    grid = grids[modules[0]]
    stage = grid.coordinate(rank, "pp")
    bridges: dict[str, str] = {}
    if not is_colocated(grids.values()):
        if LANGUAGE not in modules and grid.is_on_last_stage(rank):
            bridges = dict.fromkeys(TO_NEXT, modules[0])
        elif LANGUAGE in modules and stage == 0:
            encoders = [name for name in grids if name != LANGUAGE]
            bridges = dict.fromkeys(TO_PREVIOUS, ", ".join(encoders))
    return Place(modules=modules, stage=stage, bridges=bridges)


def _row(span: Span) -> tuple[Any, ...]:
    return (
        span.kind,
        span.module,
        span.stage,
        span.start,
        span.end,
        span.microbatch,
        span.bridge,
    )


def _optimizers(optimizer: Any, modules: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The optimizer of each module on this rank."""
    infos = getattr(optimizer, "module_infos", None)
    if infos is None:
        yield modules[0], optimizer
        return
    for name in modules:
        if infos[name].optimizer is not None:
            yield name, infos[name].optimizer


def _around(
    owner: Any,
    name: str,
    context: Callable[..., AbstractContextManager[None]],
    look_at: Callable[[Any], None] = lambda result: None,
) -> Callable[[], None]:
    """Run a method of an object inside a context and look at what it returns.

    Returns:
        What undoes it.
    """
    method = getattr(owner, name)
    before = vars(owner).get(name)

    @wraps(method)
    def observed(*args: Any, **kwargs: Any) -> Any:
        with context(*args):
            result = method(*args, **kwargs)
        look_at(result)
        return result

    setattr(owner, name, observed)

    def undo() -> None:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in what is handed to a communicator."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
