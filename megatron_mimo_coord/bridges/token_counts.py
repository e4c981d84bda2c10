"""What a ``MimoModel`` does about samples with different numbers of tokens.

Megatron 0.19 takes it for granted that every sample has as many image tokens as the next, when an
encoder has more data-parallel ranks than the language model (fan-in): its receiver splits the
gradient evenly on the way back, and ``MimoModel`` refuses to attach split sizes to an output.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.text_fit import TextFit
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import (
    bounds_of,
    input_ids_of,
    is_first_stage,
    is_last_stage,
    packing_of,
    read_texts_by,
    set_split_sizes,
)


class TokenCounts:
    """Stands in for what a ``MimoModel`` reads on the host to split an encoder's output.

    With Megatron's own communicator, samples that differ under fan-in fail far from their cause: a
    shape error inside backward, or a wait without end. So it refuses them with a sentence, until a
    communicator that can carry them is built.

    That one needs to know how many tokens a sample has where an output goes to several ranks
    (fan-out). An assignment says it; without one it is read from ``input_ids``, once a microbatch,
    which waits for the device; and so is, on any encoder rank that was fed nothing, that its
    samples have no tokens. So does what ``MimoModel`` reads on the language model's first stage
    to put text and modalities together (``get_text_embeddings``,
    ``align_embeddings_by_token_positions``); that is inside its forward, and left to it.

    Of an encoder's samples it reads the rows of ``input_ids`` that are theirs, or what is theirs of
    a packed row: all of them, or a part where another encoder of the rank has a smaller DP, whose
    samples' text the rank is given. Where it is given the whole microbatch's, it reads the right
    part too, so that the step goes on to where all ranks hear of the mistake
    (``gradients/step_report.py``); and so they do where no text says how many tokens are for whom.

    Args:
        job: whose model is watched. Where the language model is, the text is its own.
        assignments: which say what an assigned image has.
        fit: compares texts with tokens.
        changes: where is recorded what is changed in the model.

    Attributes:
        micro_batch_size: samples in a microbatch over all ranks; None if it is not known.
        may_vary: whether a communicator is built that carries samples which differ.
    """

    def __init__(
        self, job: Job, assignments: PendingAssignments, fit: TextFit, changes: Changes
    ) -> None:
        model, grids, rank = job.model, job.grids, job.rank
        self._fit = fit
        self._model = model
        self.micro_batch_size: int | None = None
        self._places = {
            name: (grid.data_parallel_size, grid.coordinate(rank, "dp"))
            for name, grid in grids.items()
            if rank in grid.ranks and rank not in grids[LANGUAGE].ranks
        }
        replicas = grids[LANGUAGE].data_parallel_size
        sizes = {n: grid.data_parallel_size for n, grid in grids.items() if n != LANGUAGE}
        self._fan_in = {name: size // replicas for name, size in sizes.items() if size > replicas}
        self._fan_out = {name: replicas // size for name, size in sizes.items() if size < replicas}
        self.may_vary = False
        self._packing: Mapping[str, Any] | None = None
        self._assignments = assignments
        changes.on_close(model.register_forward_pre_hook(self._look, with_kwargs=True).remove)
        read_texts_by(model, self._attach_split_sizes, self._has_encoder_tokens, changes)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, microbatches may have another size."""
        before = self.micro_batch_size
        try:
            yield
        finally:
            self.micro_batch_size = before

    def _attach_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """On an encoder's last stage: only under fan-out has it several receivers to split for.

        An output of [sequence, sample, hidden] is cut by samples, which need no counting.
        """
        is_sent = is_last_stage(self._model, encoder_name) and output.ndim == 2
        if encoder_name not in self._places or not is_sent:
            return
        is_assigned = self._assignments.next(encoder_name) is not None
        if encoder_name in self._fan_out and len(output) and not is_assigned:
            sizes = self._sizes(encoder_name, input_ids, len(output))
            if sizes:
                set_split_sizes(output, sizes)

    def _sizes(self, name: str, input_ids: torch.Tensor | None, tokens: int) -> list[int]:
        """Tokens of each sample of an encoder that feeds several ranks, or of each rank."""
        ranks, is_packed, texts = self._fan_out[name], self._packing is not None, 0
        if input_ids is not None:
            counts = self._count(name, input_ids)
            part = self._part_of(name, counts, tokens)
            texts = len(counts[part])
            if texts and texts % ranks == 0:
                text = input_ids if is_packed else input_ids[part]
                microbatch = self._assignments.microbatch
                return self._fit.sizes(name, counts[part].tolist(), tokens, microbatch, text)
        if not self.may_vary:
            return []  # of Megatron's own, which cuts evenly
        return self._fit.unknown(name, tokens, ranks, texts, is_packed)

    def _has_encoder_tokens(self, input_ids: torch.Tensor | None, encoder_name: str) -> bool:
        """On an encoder rank without images: an assignment tells without asking the device."""
        assignment = self._assignments.next(encoder_name)
        if assignment is not None:
            return any(assignment.tokens[sample][image] for sample, image in assignment.local)
        if input_ids is None or encoder_name not in self._places:
            return False
        if encoder_name not in self._model.special_token_ids:
            return False
        counts = self._count(encoder_name, input_ids)
        if counts[self._part_of(encoder_name, counts, 0)].any():
            raise RuntimeError(
                f"this rank was given no inputs for {encoder_name!r}, but its input_ids have "
                f"tokens of it: pass the inputs of its samples, and of input_ids its slice and "
                f"not the whole microbatch, input_ids[coordinator.data_parallel_slice("
                f"micro_batch_size, {encoder_name!r})]"
            )
        return False

    def _part_of(self, name: str, counts: torch.Tensor, tokens: int) -> slice:
        """Which of the samples of ``input_ids`` are an encoder's, which has so many tokens."""
        rows, (size, place) = len(counts), self._places[name]
        fewest, place_of_fewest = min(self._places.values())
        expected = _part(rows, size // fewest, place - place_of_fewest * (size // fewest))
        of_whole = _part(rows, size, place)
        is_whole = rows == self.micro_batch_size
        if of_whole == expected or not (is_whole or self.micro_batch_size is None):
            return expected
        likely, other = (of_whole, expected) if is_whole else (expected, of_whole)
        return likely if counts[likely].sum() == tokens else other  # this waits for the device

    def _look(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember how samples are packed.

        On a language model rank: each encoder rank must have sent the same number of tokens.
        """
        self._packing = packing_of(args, kwargs)
        input_ids = input_ids_of(args, kwargs)
        if self.may_vary or input_ids is None or not model.training:
            return
        for name, ratio in self._fan_in.items() if is_first_stage(self._model, LANGUAGE) else ():
            counts = self._count(name, input_ids)
            if len(counts) % ratio:
                continue
            numbers = counts.view(ratio, -1).sum(dim=1).tolist()
            if len(set(numbers)) > 1:
                raise RuntimeError(
                    f"{ratio} ranks of {name} send to one language model rank, and their samples "
                    f"have different numbers of {name} tokens ({numbers}): Megatron's own "
                    f"communicator splits the gradient evenly and would fail in backward. Build "
                    f"the schedule's p2p_communicator with "
                    f"coordinator.build_pipeline_communicator(config)"
                )

    def _count(self, name: str, input_ids: torch.Tensor) -> torch.Tensor:
        """An encoder's tokens in each sample, on the device."""
        is_its = input_ids == self._model.special_token_ids.get(name)
        bounds = None if self._packing is None else bounds_of(self._packing)
        if bounds is None:
            return is_its.sum(dim=1)
        before = torch.nn.functional.pad(is_its.flatten().cumsum(0), (1, 0))
        return before[bounds.to(before.device).long()].diff()


def _part(rows: int, number: int, index: int) -> slice:
    """One of so many equal parts of some rows; all of them where they do not divide."""
    share = rows // number
    return slice(index * share, (index + 1) * share) if share * number == rows else slice(None)
