"""A step in three phases, where encoders share ranks with the language model.

First the encoders run, over all microbatches; then Megatron's own schedule runs the language model;
then comes the encoders' backward. The trainer's forward step is called for a microbatch in each of
the first two, with the same batch: what a batch's images become is known, and waits, when the
language model reads its text.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from attrs import define, field, frozen
from megatron.core.models.mimo import MimoModel
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.communicator import PipelineCommunicator
from megatron_mimo_coord.bridges.shared_bridges import Output, Tensors, Waiting
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import input_ids_of
from megatron_mimo_coord.megatron.schedule import OUT_OF_BATCHES, run_encoders, run_pipeline
from megatron_mimo_coord.megatron.second_forwards import remember_forward
from megatron_mimo_coord.megatron.turns import Turns, outputs_of

Edges = Mapping[str, GradientEdge]
"""Of each encoder whose output waits for a gradient, where its backward begins."""


@frozen
class _Encoded:
    """What the backward of a microbatch's encoders begins with.

    Args:
        number: of the microbatch.
        encoders: those that it runs through.
        edges: what finds its edges; if no activation is kept, it runs the encoders once more.
    """

    number: int
    encoders: Sequence[str]
    edges: Callable[[], Edges]


@define(eq=False)
class _Step:
    """A step that is under way.

    Args:
        first_kept: the first microbatch of which the encoders' activations are kept.

    Attributes:
        outputs: of each encoder, what it made of each microbatch, until that is on its way.
        encoded: what the encoders' backward begins with.
        assigned: what ``assign_images`` made in the first phase, and will return in the second.
        taken: all assignments of the step.
    """

    first_kept: int
    outputs: dict[str, list[Output]] = field(factory=lambda: defaultdict(list))
    encoded: list[_Encoded] = field(factory=list)
    assigned: dict[str, deque[ImageAssignment]] = field(factory=lambda: defaultdict(deque))
    taken: list[ImageAssignment] = field(factory=list)


class _Batches:
    """Batches that are read twice: what was fetched comes again, in the same order."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._fetched: deque[Any] = deque()
        self._is_replayed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._is_replayed:
            try:
                self._fetched.append(next(self._source))
            except StopIteration as error:
                raise RuntimeError(OUT_OF_BATCHES) from error
            return self._fetched[-1]
        if not self._fetched:
            raise RuntimeError(
                "the forward step fetches more batches for the language model than it did for the "
                "encoders: it is called for each microbatch twice, and must fetch the same"
            )
        return self._fetched.popleft()

    def again(self) -> "_Batches":
        """From the first on."""
        self._is_replayed = True
        return self


class EncodersFirst:
    """Runs steps in three phases.

    Args:
        model: the model.
        turns: which of its modules run.
        assignments: the model's.
        no_sync: inside of it a module's gradients are not reduced.
        changes: where is recorded that the model's forward is watched.
    """

    def __init__(
        self,
        model: MimoModel,
        turns: Turns,
        assignments: PendingAssignments,
        no_sync: Callable[[str], AbstractContextManager[None]],
        changes: Changes,
    ) -> None:
        self._model = model
        self._turns = turns
        self._assignments = assignments
        self._no_sync = no_sync
        self._step: _Step | None = None
        self._call: tuple[Any, Any] | None = None
        self._second_forward: Callable[[], AbstractContextManager[None]] | None = None
        changes.on_close(
            model.register_forward_pre_hook(self._remember_call, with_kwargs=True).remove
        )

    @property
    def is_running(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    def run(
        self,
        communicator: PipelineCommunicator,
        keep: int | None,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        num_microbatches: int,
        forward_only: bool,
        **options: Any,
    ) -> Any:
        """What Megatron's schedule returns; gradients are there, and not finalized.

        Args:
            communicator: the schedule's.
            keep: of how many microbatches the encoders' activations are kept; None for all.
            forward_step_func, data_iterator, num_microbatches, forward_only, options: as Megatron's
                schedule takes them.
        """
        bridges = communicator.shared_bridges
        assert bridges is not None, "encoders share ranks with the language model"
        source = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        batches = None if source is None else _Batches(source)  # as on a stage that reads nothing
        if keep is None or forward_only:  # where nothing goes backward, nothing runs again
            keep = num_microbatches
        self._step = step = _Step(num_microbatches - keep)
        try:
            with self._turns.of_encoders():
                for number in range(num_microbatches):
                    outputs = run_encoders(
                        forward_step_func,
                        batches,
                        options["model"][0],
                        communicator.config,
                        number,
                        num_microbatches,
                    )
                    self._take(step, number, outputs, bridges.encoders, forward_only)
                    del outputs
            delivered = bridges.deliver(step.outputs)
            step.outputs.clear()
            waiting = [Waiting(n, delivered.tokens.pop(n)) for n in list(delivered.tokens)]
            communicator.waiting = waiting
            self._assignments.begin_pass()
            with self._turns.of_language():
                losses = run_pipeline(
                    forward_step_func=forward_step_func,
                    data_iterator=batches and batches.again(),
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    p2p_communicator=communicator,
                    **options,
                )
            if not forward_only:
                gradients = {each.name: each.gradients for each in waiting}
                self._backward(step, delivered.give_back(gradients))
            return losses
        finally:
            self._step, communicator.waiting = None, []
            self._assignments.end_pass(step.taken)

    # -- images that are assigned ------------------------------------------------------------------

    def assigned(self, assignment: ImageAssignment) -> None:
        """Images were assigned; if the encoders run, they will be once more."""
        if self._step is not None and self._turns.encoders:
            self._step.assigned[assignment.module].append(assignment)
            self._step.taken.append(assignment)

    def assigned_before(self, encoder: str) -> ImageAssignment | None:
        """If the language model runs, how this microbatch's images were assigned."""
        if self._step is None or not self._turns.language or not self._step.assigned[encoder]:
            return None
        return self._step.assigned[encoder].popleft()

    # -- the encoders' phases ----------------------------------------------------------------------

    def _remember_call(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._turns.encoders:
            self._call = args, kwargs
            is_run_again = self._step is not None and self._step.first_kept > 0
            submodules = self._model.modality_submodules
            self._second_forward = remember_forward(submodules) if is_run_again else None

    def _take(
        self, step: _Step, number: int, outputs: Any, encoders: list[str], forward_only: bool
    ) -> None:
        """Keep what the encoders made of a microbatch, and what their backward needs."""
        call, self._call = self._call, None
        if call is None:
            raise RuntimeError(
                f"the forward step returned for microbatch {number} without calling the model: it "
                f"is called for the encoders first, and must pass them their inputs"
            )
        for name in encoders:
            output, assignment = outputs.get(name), self._assignments.take(name)
            if output is not None:
                output = output.detach().requires_grad_(output.requires_grad)
            step.outputs[name].append(Output(output, assignment, input_ids_of(*call)))
            step.taken += [] if assignment is None else [assignment]
        edges = _edges(outputs)
        if forward_only or not edges:
            return
        again = None
        if number < step.first_kept:
            assert self._second_forward is not None, "remembered where not all is kept"
            again = partial(self._again, call, self._second_forward)
        step.encoded.append(_Encoded(number, list(edges), again or (lambda: edges)))

    def _again(
        self, call: tuple[Any, Any], second_forward: Callable[[], AbstractContextManager[None]]
    ) -> Edges:
        """Run the encoders of a microbatch once more."""
        with second_forward():
            return _edges(outputs_of(self._model, *call))

    def _backward(self, step: _Step, gradients: Tensors) -> None:
        """The encoders' backward; what is kept goes first, and the last one of each reduces.

        Ranks that meet in an encoder's backward have images of it in the same microbatches, but
        not of others.
        """
        encoded = sorted(step.encoded, key=lambda each: each.number < step.first_kept)
        step.encoded.clear()
        last = {name: each.number for each in encoded for name in each.encoders}
        with self._turns.of_encoders():
            while encoded:
                each = encoded.pop(0)
                edges = each.edges()
                for name in reversed(each.encoders):
                    is_last = each.number == last[name]
                    with nullcontext() if is_last else self._no_sync(name):
                        torch.autograd.backward(edges[name], gradients[name][each.number])
                    gradients[name][each.number] = None


def _edges(outputs: Mapping[str, torch.Tensor]) -> Edges:
    return {
        name: get_gradient_edge(output)
        for name, output in outputs.items()
        if output.grad_fn is not None
    }
