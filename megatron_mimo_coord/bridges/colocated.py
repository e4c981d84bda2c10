"""Bridges between modules on the same ranks, for modality tokens that vary between samples.

Where an encoder and the language model share their ranks with different DP sizes, Megatron gathers
encoder outputs (fan-in) or cuts them up (fan-out) in equal parts, and a rank without an image does
not take part at all. Here ranks tell each other how many tokens they have, and all take part.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

from megatron_mimo_coord.world.timeouts import inherit_timeout


def allow_varying_token_counts(model: MimoModel) -> None:
    """Make a model's colocated bridges exchange as many tokens as there are."""
    if not hasattr(model, "_mimo_colocated_exchange"):
        model._mimo_colocated_exchange = _Exchange(model)


class _Exchange:
    """Stands in for ``MimoModel._apply_colocated_comms``."""

    def __init__(self, model: MimoModel) -> None:
        self._model = model
        self._input_ids: torch.Tensor | None = None
        model.register_forward_pre_hook(self._remember_text, with_kwargs=True)
        model._apply_colocated_comms = self._between_modules
        inherit_timeout(*(bridge.gather_pg for bridge in model.colocated_comms.values()))

    def _remember_text(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _between_modules(self, embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens [token, hidden] of each modality, from the encoder's layout to the language's."""
        for (name, _), bridge in self._model.colocated_comms.items():
            tokens = embeddings.get(name)
            if bridge.gather_pg is None or (tokens is None and bridge.is_fan_out()):
                continue  # equal DP; or no rank of this group's samples has an image
            if tokens is None:
                tokens = self._model._empty_encoder_output(name)
            # What Megatron makes in place of tokens has this dtype, and so must all ranks' tokens,
            # whatever Float16Module made of an encoder's output; the text's embeddings have it too.
            tokens = tokens.to(self._model.config.params_dtype)
            count = len(tokens) if bridge.is_fan_in() else self._tokens_in_text(name)
            sizes = _sizes(count, bridge.gather_pg, tokens.device)
            embeddings[name] = _ExchangeTokens.apply(tokens, bridge, sizes)
        return embeddings

    def _tokens_in_text(self, name: str) -> int:
        assert self._input_ids is not None, "MimoModel.forward takes input_ids"
        return int((self._input_ids == self._model.special_token_ids[name]).sum())


class _ExchangeTokens(torch.autograd.Function):
    """Gathers forward and cuts backward on fan-in; the reverse on fan-out."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, bridge: ColocatedBridgeCommunicator, sizes: list[int]
    ) -> torch.Tensor:
        ctx.bridge, ctx.sizes = bridge, sizes
        exchange = _gather if bridge.is_fan_in() else _cut
        return exchange(tokens, bridge.gather_pg, sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        exchange = _cut if ctx.bridge.is_fan_in() else _gather
        return exchange(grad, ctx.bridge.gather_pg, ctx.sizes), None, None


def _sizes(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Tokens of each rank of a group, in the group's order."""
    mine = torch.tensor([count], dtype=torch.int64, device=device)
    all_of_them = mine.new_empty((group.size(),))
    dist.all_gather_into_tensor(all_of_them, mine, group=group)
    return all_of_them.tolist()


def _gather(tokens: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """The tokens of all ranks, one behind the other."""
    padded = tokens.new_zeros((max(sizes), *tokens.shape[1:]))
    padded[: len(tokens)] = tokens
    gathered = tokens.new_empty((len(sizes) * max(sizes), *tokens.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    parts = gathered.split(max(sizes)) if max(sizes) else [gathered] * len(sizes)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _cut(tokens: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """This rank's part."""
    start = sum(sizes[: group.rank()])
    return tokens[start : start + sizes[group.rank()]].contiguous()
