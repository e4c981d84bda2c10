"""A step in three phases, where encoders share ranks with the language model.

First the encoders run, over all microbatches; then Megatron's own schedule runs the language model;
then comes the encoders' backward. The trainer's forward step is called for a microbatch in each of
the first two, with the same batch: what a batch's images become is known, and waits, when the
language model reads its text.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.communicator import PipelineCommunicator
from megatron_mimo_coord.bridges.shared_bridges import Output, Tensors
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.megatron.forwards import Given
from megatron_mimo_coord.megatron.schedule import run_encoders, run_pipeline
from megatron_mimo_coord.megatron.second_forwards import remember_forward
from megatron_mimo_coord.megatron.turns import Turns

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


class _Batches:
    """Batches that are read twice: what was fetched comes again, in the same order.

    Attributes:
        are_fetched: whether they come again now.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._fetched: deque[Any] = deque()
        self.are_fetched = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.are_fetched:
            self._fetched.append(next(self._source))
            return self._fetched[-1]
        if not self._fetched:
            raise RuntimeError(
                "the forward step fetches more batches for the language model than it did for the "
                "encoders: it is called for each microbatch twice, and must fetch the same"
            )
        return self._fetched.popleft()


class EncodersFirst:
    """Runs steps in three phases.

    Args:
        job: the model.
        turns: which of its modules run.
        assignments: the model's.
        no_sync: inside of it a module's gradients are not reduced.
    """

    def __init__(
        self,
        job: Job,
        turns: Turns,
        assignments: PendingAssignments,
        no_sync: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._model = job.model
        self._turns = turns
        self._assignments = assignments
        self._no_sync = no_sync
        self._first_kept = 0  # the first microbatch of which the encoders' activations are kept
        # What the encoders were given last, and what a second forward of the same runs in.
        self._given: Given | None = None
        self._second_forward: Callable[[], AbstractContextManager[None]] = nullcontext
        job.forwards.watch(self._remember)

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
        self._first_kept = num_microbatches - keep
        outputs: dict[str, list[Output]] = {name: [] for name in bridges.encoders}
        encoded: list[_Encoded] = []
        self._assignments.begin_pass(keeps=True)
        try:
            with self._turns.of_encoders():
                for number in range(num_microbatches):
                    made = run_encoders(
                        forward_step_func,
                        batches,
                        options["model"][0],
                        communicator.config,
                        number,
                        num_microbatches,
                    )
                    one = self._take(number, made, outputs)
                    encoded += [] if one is None or forward_only else [one]
                    del made, one
            communicator.delivered = delivered = bridges.deliver(outputs)
            outputs.clear()
            if batches is not None:
                batches.are_fetched = True
            self._assignments.begin_pass(repeats=True)
            with self._turns.of_language():
                losses = run_pipeline(
                    forward_step_func=forward_step_func,
                    data_iterator=batches,
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    p2p_communicator=communicator,
                    **options,
                )
            if not forward_only:
                self._backward(encoded, delivered.give_back(delivered.gradients))
            return losses
        finally:
            communicator.delivered = None
            self._assignments.end_step()

    # -- the encoders' phases ----------------------------------------------------------------------

    def _remember(self, given: Given) -> None:
        if self._turns.encoders:
            self._given, self._second_forward = given, nullcontext
            if self._first_kept > 0:
                self._second_forward = remember_forward(self._model.modality_submodules)

    def _take(
        self, number: int, made: Mapping[str, torch.Tensor], outputs: Mapping[str, list[Output]]
    ) -> _Encoded | None:
        """Keep what the encoders made of a microbatch; returns what their backward needs."""
        given, self._given = self._given, None
        if given is None:
            raise RuntimeError(
                f"the forward step returned for microbatch {number} without calling the model: it "
                f"is called for the encoders first, and must pass them their inputs"
            )
        for name, kept in outputs.items():
            assignment = self._assignments.take(name)
            kept.append(Output.of(made.get(name), assignment, given.get("input_ids")))
        edges = _edges(made)
        if not edges:
            return None
        if number < self._first_kept:
            return _Encoded(number, list(edges), partial(self._again, given, self._second_forward))
        return _Encoded(number, list(edges), lambda: edges)

    def _again(
        self, given: Given, second_forward: Callable[[], AbstractContextManager[None]]
    ) -> Edges:
        """Run the encoders of a microbatch once more, past the hooks of the model."""
        with second_forward():
            outputs, _ = self._model.forward(**given)
            return _edges(outputs)

    def _backward(self, encoded: list[_Encoded], gradients: Tensors) -> None:
        """The encoders' backward; what is kept goes first, and the last one of each reduces.

        Ranks that meet in an encoder's backward have images of it in the same microbatches, but
        not of others.
        """
        encoded.sort(key=lambda each: each.number < self._first_kept)
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
