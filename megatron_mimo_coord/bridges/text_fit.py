"""Texts that have other numbers of an encoder's tokens than it made, such as texts that were cut.

Or whose length does not divide by the ranks that share it; or tokens of another width. The rank
that finds it is not alone: its peers wait for what it sends. So the step goes on, with texts and
tokens that are cut or filled up with zeros, to where all ranks hear of it, before an optimizer uses
the gradients. Nothing is asked of the device that ``MimoModel`` does not ask already.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel
from torch.nn.functional import pad

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.misfits import (
    other_tokens,
    other_width,
    uncut_row,
    uneven_length,
    uneven_samples,
    unknown_parts,
)
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import (
    bounds_of,
    input_ids_of,
    is_last_stage,
    lengthen_texts,
    packed_sample_parts,
    packing_of,
    packing_problem,
    sequence_parts,
    without_packing,
)


class TextFit:
    """Compares texts with tokens, and looks at what the model puts together.

    Args:
        job: the model, and the modules on this rank.
        assignments: which count microbatches.
        report: told of what does not fit; raises in an evaluation.
        changes: where is recorded what is changed in the model.
    """

    def __init__(
        self, job: Job, assignments: PendingAssignments, report: StepReport, changes: Changes
    ) -> None:
        self._model = model = job.model
        self._assignments = assignments
        self._report = report
        for name, ddp in job.ddps.items():
            if name != LANGUAGE and is_last_stage(model, name):
                hook = partial(self._widen, name)
                changes.on_close(ddp.module.register_forward_hook(hook).remove)
        changes.set(model, "align_embeddings_by_token_positions", self._align)
        if sequence_parts(model)[0] > 1 and model.language_model is not None:
            changes.on_close(
                model.register_forward_pre_hook(self._make_even, with_kwargs=True).remove
            )

    def _widen(
        self, name: str, _: Any, __: Any, tokens: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Have an encoder's tokens be as wide as the language model's."""
        hidden_size = self._model.config.hidden_size
        if tokens is None or tokens.shape[-1] == hidden_size:
            return None
        self._report.tell(other_width(name, tokens.shape[-1], hidden_size))
        return pad(tokens, (0, hidden_size - tokens.shape[-1]))

    def _make_even(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Have ``MimoModel`` run texts that it would refuse on some ranks alone."""
        microbatch = self._assignments.microbatch
        text, packing = input_ids_of(args, kwargs), packing_of(args, kwargs)
        if text is None:
            return None
        length, is_packed = text.shape[-1], packing is not None
        parts, why = sequence_parts(self._model, is_packed)
        problem = packing_problem(self._model, packing) if packing is not None else ""
        if problem:
            self._report.tell(uncut_row(microbatch, problem))
        elif length % parts:
            self._report.tell(uneven_length(microbatch, length, parts, why))
        else:
            sample_parts = packed_sample_parts(self._model)
            if packing is not None and sample_parts > 1:
                bounds = bounds_of(packing)
                self._report.tell(uneven_samples(microbatch, bounds, sample_parts, why))
            return None
        parts, _ = sequence_parts(self._model)
        return lengthen_texts(*without_packing(args, kwargs), -length % parts)

    def sizes(
        self,
        name: str,
        counts: Sequence[int],
        tokens: int,
        microbatch: int,
        text: torch.Tensor | None,
    ) -> list[int]:
        """As many numbers, whose sum is the number of tokens.

        Args:
            name: the encoder.
            counts: of those who share its tokens, how many their texts have.
            tokens: that it made.
            microbatch: in its pass.
            text: [sample, token], this rank's if it has one.
        """
        if sum(counts) == tokens:
            return list(counts)
        self._misfit(name, counts, text, tokens, microbatch, is_part=True)
        return _cut_off(counts, tokens)

    def unknown(self, name: str, tokens: int, ranks: int, texts: int, is_packed: bool) -> list[int]:
        """Numbers to go on with, where nobody knows how many tokens are for whom."""
        place = self._report.dp_rank(name)
        microbatch = self._assignments.microbatch
        self._report.tell(unknown_parts(name, microbatch, tokens, ranks, texts, is_packed, place))
        return _cut_off([-(-tokens // ranks)] * ranks, tokens)

    def _align(
        self,
        modality_embeddings: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Stands in for ``MimoModel``'s, which refuses other numbers."""
        put_together = MimoModel.align_embeddings_by_token_positions
        try:
            return put_together(self._model, modality_embeddings, input_ids, special_token_ids)
        except ValueError:
            fitted = {
                name: self._fitted(name, tokens, input_ids)
                for name, tokens in modality_embeddings.items()
            }
            if all(fitted[name] is tokens for name, tokens in modality_embeddings.items()):
                raise
        return put_together(self._model, fitted, input_ids, special_token_ids)

    def _fitted(self, name: str, tokens: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """As many tokens as the text has."""
        if name not in self._model.special_token_ids:
            return tokens
        number = int((input_ids == self._model.special_token_ids[name]).sum())
        if number == len(tokens):
            return tokens
        self._misfit(name, (), input_ids, len(tokens), self._assignments.microbatch)
        if number < len(tokens):
            return tokens[:number]
        return torch.cat([tokens, tokens.new_zeros((number - len(tokens), *tokens.shape[1:]))])

    def _misfit(
        self,
        name: str,
        counts: Sequence[int],
        text: torch.Tensor | None,
        tokens: int,
        microbatch: int,
        is_part: bool = False,
    ) -> None:
        cut: list[int] = []
        if text is not None:
            is_its = text == self._model.special_token_ids[name]
            counts, cut = is_its.sum(1).tolist(), is_its[:, -1].nonzero().flatten().tolist()
        place = self._report.dp_rank(name)
        self._report.tell(other_tokens(name, microbatch, counts, tokens, place, cut, is_part))


def _cut_off(counts: Sequence[int], total: int) -> list[int]:
    """Numbers like these, whose sum is the total."""
    sizes, left = [], total
    for count in counts[:-1]:
        sizes.append(min(count, left))
        left -= sizes[-1]
    return [*sizes, left]
