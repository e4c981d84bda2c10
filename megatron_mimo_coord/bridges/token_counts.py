"""What a ``MimoModel`` does about samples with different numbers of tokens.

Megatron 0.19 takes it for granted that every sample has as many image tokens as the next, when an
encoder has more data-parallel ranks than the language model (fan-in): its receiver splits the
gradient evenly on the way back, and ``MimoModel`` refuses to attach split sizes to an output.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, Topology


def fan_in_ratios(grids: Mapping[str, ModuleGrid], topology: Topology) -> dict[str, float]:
    """Encoder ranks for each language model rank, below 1 on fan-out, for each encoder."""
    return {
        name: grids[name].data_parallel_size / grids[LANGUAGE].data_parallel_size
        for name, targets in topology.items()
        if LANGUAGE in targets
    }


class TokenCounts:
    """Stands in for what a ``MimoModel`` reads on the host to split an encoder's output.

    With Megatron's own communicator, samples that differ under fan-in fail far from their cause: a
    shape error inside backward, or a wait without end. So it refuses them with a sentence, until a
    communicator that can carry them is built.

    That one needs to know how many tokens a sample has where an output goes to several ranks
    (fan-out). An assignment says it; without one it is read from ``input_ids``, which waits for the
    device if they are there. So does what ``MimoModel`` reads on the language model's first stage
    to put text and modalities together (``get_text_embeddings``,
    ``align_embeddings_by_token_positions``); that is inside its forward, and left to it.

    Args:
        model: the model; its forward is watched.
        ratios: for each encoder, its ranks for one of the language model's.
    """

    def __init__(self, model: MimoModel, ratios: Mapping[str, float]) -> None:
        self._model = model
        self._fan_in = {name: int(ratio) for name, ratio in ratios.items() if ratio > 1}
        self._fan_out = {name for name, ratio in ratios.items() if ratio < 1}
        self._may_vary = False
        self._assignments = PendingAssignments.of(model)
        self._watch = model.register_forward_pre_hook(self._refuse_uneven_ranks, with_kwargs=True)
        model._attach_modality_split_sizes = self._attach_split_sizes
        model._has_encoder_tokens = self._has_encoder_tokens

    @classmethod
    def of(cls, model: MimoModel, ratios: Mapping[str, float]) -> "TokenCounts":
        """The one of this model, whoever asked for it first."""
        if not hasattr(model, "_mimo_token_counts"):
            model._mimo_token_counts = cls(model, ratios)
        return model._mimo_token_counts

    def allow_varying(self) -> None:
        """A communicator that carries them is built."""
        self._may_vary = True
        self._watch.remove()

    def _attach_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """On an encoder rank: only under fan-out does it have several receivers to split for."""
        if encoder_name in self._fan_in:
            if not self._may_vary and input_ids is not None:
                self._refuse_uneven(encoder_name, self._count(encoder_name, input_ids))
        elif encoder_name in self._fan_out and self._assignments.next(encoder_name) is None:
            MimoModel._attach_modality_split_sizes(self._model, output, input_ids, encoder_name)

    def _has_encoder_tokens(self, input_ids: torch.Tensor | None, encoder_name: str) -> bool:
        """On an encoder rank without images: an assignment tells without asking the device."""
        assignment = self._assignments.next(encoder_name)
        if assignment is None:
            if MimoModel._has_encoder_tokens(self._model, input_ids, encoder_name):
                raise RuntimeError(
                    f"this rank was given no inputs for {encoder_name!r}, but its input_ids have "
                    f"tokens of it: pass the inputs of its samples, and of input_ids its slice and "
                    f"not the whole microbatch, input_ids[coordinator.data_parallel_slice("
                    f"micro_batch_size, {encoder_name!r})]"
                )
            return False
        return any(assignment.tokens[sample][image] for sample, image in assignment.local)

    def _refuse_uneven_ranks(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """On a language model rank: each encoder rank must have sent the same number of tokens."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        role = self._model.role
        if input_ids is None or not model.training or not role.is_first_stage(LANGUAGE):
            return
        for name, ratio in self._fan_in.items():
            if len(input_ids) % ratio == 0:
                counts = self._count(name, input_ids).view(ratio, -1)
                self._refuse_uneven(name, counts.sum(dim=1))

    def _count(self, name: str, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self._model.special_token_ids.get(name)).sum(dim=1)

    def _refuse_uneven(self, name: str, counts: torch.Tensor) -> None:
        numbers = counts.tolist()
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"{self._fan_in[name]} ranks of {name} send to one language model rank, and their "
                f"samples have different numbers of {name} tokens ({numbers}): Megatron's own "
                f"communicator splits the gradient evenly and would fail in backward. Build the "
                f"schedule's p2p_communicator with coordinator.build_pipeline_communicator(config)"
            )
