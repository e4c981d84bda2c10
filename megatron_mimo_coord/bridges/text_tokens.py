"""How many tokens of an encoder a text has, and what if the encoder made others.

Texts are cut, or belong to other samples; tokens are of another width. The rank that finds it is
not alone: its peers wait for what it sends. So the step goes on, with tokens that are cut or filled
up with zeros, to where all ranks hear of it, before an optimizer uses the gradients. Nothing is
asked of the device that ``MimoModel`` does not ask already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel
from torch.nn.functional import pad

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.misfits import Misfit, Misfits
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.forwards import Given, bounds_of
from megatron_mimo_coord.megatron.mimo_model import (
    is_first_stage,
    is_last_stage,
    read_texts_by,
    set_split_sizes,
)


class TextTokens:
    """Stands in for what a ``MimoModel`` reads in texts, to split and to place an encoder's output.

    Megatron 0.19 takes it for granted that every sample has as many image tokens as the next, when
    an encoder has more data-parallel ranks than the language model (fan-in): its receiver splits
    the gradient evenly on the way back, and ``MimoModel`` refuses to attach split sizes. With
    Megatron's own communicator, samples that differ fail far from their cause: a shape error inside
    backward, or a wait without end. So they are refused with a sentence, until a communicator that
    can carry them is built.

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
    (``gradients/rows_read.py``); and so they do where no text says how many tokens are for whom.

    Args:
        job: whose model is watched. Where the language model is, the text is its own.
        assignments: which say what an assigned image has, and count microbatches.
        misfits: are told of what does not fit; raise in an evaluation.

    Attributes:
        micro_batch_size: samples in a microbatch over all ranks; None if it is not known.
        may_vary: whether a communicator is built that carries samples which differ.
    """

    def __init__(self, job: Job, assignments: PendingAssignments, misfits: Misfits) -> None:
        self._model, changes = job.model, job.changes
        self._assignments = assignments
        self._misfits = misfits
        self.micro_batch_size: int | None = None
        self.may_vary = False
        self._packing: Mapping[str, Any] | None = None
        sizes = {name: grid.data_parallel_size for name, grid in job.grids.items()}
        replicas = sizes.pop(LANGUAGE)
        self._fan_in = {name: size // replicas for name, size in sizes.items() if size > replicas}
        self._fan_out = {name: replicas // size for name, size in sizes.items() if size < replicas}
        self._dp_ranks = {n: job.grids[n].coordinate(job.rank, "dp") for n in job.ddps}
        self._places: Mapping[str, tuple[int, int]] = {}  # (DP, DP rank) of encoders on own ranks
        if job.rank not in job.grids[LANGUAGE].ranks:
            self._places = {name: (sizes[name], at) for name, at in self._dp_ranks.items()}
        for name, ddp in job.ddps.items():
            if name != LANGUAGE and is_last_stage(job.model, name):
                hook = partial(self._widen, name)
                changes.on_close(ddp.module.register_forward_hook(hook).remove)
        job.forwards.watch(self._look)
        read_texts_by(job.model, self._attach_split_sizes, self._has_encoder_tokens, changes)
        changes.set(job.model, "align_embeddings_by_token_positions", self._align)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, microbatches may have another size."""
        before = self.micro_batch_size
        try:
            yield
        finally:
            self.micro_batch_size = before

    def total(self, name: str, text: torch.Tensor) -> torch.Tensor:
        """An encoder's tokens in a text, on the device."""
        return (text == self._model.special_token_ids[name]).sum()

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
        self._tell_others(name, counts, tokens, microbatch, text, is_part=True)
        return _cut_off(counts, tokens)

    # -- on an encoder's ranks ---------------------------------------------------------------------

    def _widen(
        self, name: str, _: Any, __: Any, tokens: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Have an encoder's tokens be as wide as the language model's."""
        hidden_size = self._model.config.hidden_size
        if tokens is None or tokens.shape[-1] == hidden_size:
            return None
        width = tokens.shape[-1]
        sentence = (
            f"the tokens of {name} have {width} numbers, but the language model's hidden_size is "
            f"{hidden_size}: project them to it, with a module in input_projections of its "
            f"VisionModalitySubmodules, or by another output size"
        )
        self._misfits.tell(Misfit((-1,), sentence))
        return pad(tokens, (0, hidden_size - width))

    def _attach_split_sizes(
        self, output: torch.Tensor, text: torch.Tensor | None, name: str
    ) -> None:
        """On an encoder's last stage: only under fan-out has it several receivers to split for.

        An output of [sequence, sample, hidden] is cut by samples, which need no counting.
        """
        is_sent = is_last_stage(self._model, name) and output.ndim == 2
        if name not in self._places or not is_sent or self._assignments.is_assigned(name):
            return
        if name in self._fan_out and len(output):
            sizes = self._split(name, text, len(output))
            if sizes:
                set_split_sizes(output, sizes)

    def _split(self, name: str, text: torch.Tensor | None, tokens: int) -> list[int]:
        """Tokens of each sample of an encoder that feeds several ranks, or of each rank."""
        ranks, is_packed, texts = self._fan_out[name], self._packing is not None, 0
        at = self._assignments.microbatch
        if text is not None:
            counts = self._count(name, text)
            part = self._part_of(name, counts, tokens)
            texts = len(counts[part])
            if texts and texts % ranks == 0:
                text = text if is_packed else text[part]
                return self.sizes(name, counts[part].tolist(), tokens, at, text)
        if not self.may_vary:
            return []  # of Megatron's own, which cuts evenly
        given = f"input_ids of {texts} {'packed samples' if is_packed else 'rows'}"
        sentence = (
            f"microbatch {at}: DP rank {self._dp_ranks[name]} of {name} made {tokens} tokens for "
            f"{ranks} ranks of the language model, but was given "
            f"{given if texts else 'no input_ids'}, which do not say how many are for whom: pass "
            f"the model input_ids of that rank's samples, as many rows for each of these ranks (or "
            f"one row of as many samples for each, with their cu_seqlens_q in packing_kwargs), or "
            f"deal the images out with coordinator.assign_images"
        )
        self._misfits.tell(Misfit((at, 0, self._dp_ranks[name]), sentence))
        return _cut_off([-(-tokens // ranks)] * ranks, tokens)

    def _has_encoder_tokens(self, text: torch.Tensor | None, name: str) -> bool:
        """On an encoder rank without images: an assignment tells without asking the device."""
        assignment = self._assignments.next(name)
        if assignment is not None:
            return any(assignment.tokens[sample][image] for sample, image in assignment.local)
        if text is None or name not in self._places:
            return False
        counts = self._count(name, text)
        if counts[self._part_of(name, counts, 0)].any():
            raise RuntimeError(
                f"this rank was given no inputs for {name!r}, but its input_ids have tokens of it: "
                f"pass the inputs of its samples, and of input_ids its slice and not the whole "
                f"microbatch, input_ids[coordinator.data_parallel_slice(micro_batch_size, "
                f"{name!r})]"
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

    def _count(self, name: str, text: torch.Tensor) -> torch.Tensor:
        """An encoder's tokens in each sample, on the device."""
        is_its = text == self._model.special_token_ids[name]
        bounds = None if self._packing is None else bounds_of(self._packing)
        if bounds is None:
            return is_its.sum(dim=1)
        before = pad(is_its.flatten().cumsum(0), (1, 0))
        return before[bounds.to(before.device).long()].diff()

    # -- on the language model's -------------------------------------------------------------------

    def _look(self, given: Given) -> None:
        """Remember how samples are packed.

        On a language model rank: each encoder rank must have sent the same number of tokens.
        """
        self._packing, text = given.get("packing_kwargs"), given.get("input_ids")
        if self.may_vary or text is None or not self._model.training:
            return
        for name, ratio in self._fan_in.items() if is_first_stage(self._model, LANGUAGE) else ():
            counts = self._count(name, text)
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

    def _fitted(self, name: str, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As many tokens as the text has."""
        if name not in self._model.special_token_ids:
            return tokens
        number = int(self.total(name, text))
        if number == len(tokens):
            return tokens
        self._tell_others(name, (), len(tokens), self._assignments.microbatch, text)
        if number < len(tokens):
            return tokens[:number]
        return torch.cat([tokens, tokens.new_zeros((number - len(tokens), *tokens.shape[1:]))])

    def _tell_others(
        self,
        name: str,
        counts: Sequence[int],
        tokens: int,
        microbatch: int,
        text: torch.Tensor | None,
        is_part: bool = False,
    ) -> None:
        """Tell of texts that have another number of an encoder's tokens than it made for them.

        Args:
            name, counts, tokens, microbatch, text: as of :meth:`sizes`; the counts are those of the
                samples, if there is no text.
            is_part: whether other ranks' texts share these tokens.
        """
        cut: list[int] = []
        if text is not None:
            is_its = text == self._model.special_token_ids[name]
            counts, cut = is_its.sum(1).tolist(), is_its[:, -1].nonzero().flatten().tolist()
        reader = LANGUAGE if LANGUAGE in self._dp_ranks else name
        first = self._dp_ranks[reader] * len(counts)
        end = (
            f"; the text of sample {first + cut[0]} ends among them, as if it was cut"
            if cut
            else ""
        )
        sentence = (
            f"microbatch {microbatch}: the texts of samples {first} to {first + len(counts) - 1} "
            f"have {sum(counts)} tokens of {name} ({', '.join(map(str, counts[:8]))}), but its "
            f"encoder made {tokens} for them"
            f"{', and for other samples with them' if is_part else ''}{end}: "
            f"leave out the images of what is cut from a text, and give each rank its slice of the "
            f"samples, their images and their input_ids"
        )
        self._misfits.tell(Misfit((microbatch, 1, not cut, first), sentence))


def _cut_off(counts: Sequence[int], total: int) -> list[int]:
    """Numbers like these, whose sum is the total."""
    sizes, left = [], total
    for count in counts[:-1]:
        sizes.append(min(count, left))
        left -= sizes[-1]
    return [*sizes, left]


def _part(rows: int, number: int, index: int) -> slice:
    """One of so many equal parts of some rows; all of them where they do not divide."""
    share = rows // number
    return slice(index * share, (index + 1) * share) if share * number == rows else slice(None)
