"""Text between ranks, as bytes of tensors: nothing is pickled."""

import torch
import torch.distributed as dist

from megatron_mimo_coord.world.device import world_device


def gather_text(text: str) -> list[str]:
    """The texts of all ranks, in their order, on rank 0; an empty list elsewhere. Collective.

    Example:
        >>> gather_text("what this rank has to say")
        ['what this rank has to say']
    """
    padded, sizes = _padded(text, dist.group.WORLD, world_device())
    is_first = dist.get_rank() == 0
    parts = [torch.empty_like(padded) for _ in sizes] if is_first else None
    dist.gather(padded, parts, dst=0)
    return [_text(part, size) for part, size in zip(parts or [], sizes, strict=is_first)]


def all_gather_text(
    text: str, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> list[str]:
    """The texts of all ranks of a group, in their order, on each of them. Collective.

    Args:
        text: this rank's.
        group: the world by default.
        device: where the group's tensors must be.

    Example:
        >>> all_gather_text("what this rank has to say", device=world_device())
        ['what this rank has to say']
    """
    padded, sizes = _padded(text, group, device)
    parts = padded.new_empty((len(sizes), *padded.shape))
    dist.all_gather_into_tensor(parts, padded[None], group=group)
    return [_text(part, size) for part, size in zip(parts, sizes, strict=True)]


def _padded(
    text: str, group: dist.ProcessGroup | None, device: torch.device | str
) -> tuple[torch.Tensor, list[int]]:
    """This rank's bytes, as many as the longest text has, and each rank's number of bytes."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([content.numel()], dtype=torch.int64, device=device)
    lengths = length.new_empty((dist.get_world_size(group),))
    dist.all_gather_into_tensor(lengths, length, group=group)
    sizes = lengths.tolist()
    padded = content.new_zeros((max(sizes),))
    padded[: content.numel()] = content
    return padded, sizes


def _text(part: torch.Tensor, size: int) -> str:
    return part[:size].cpu().numpy().tobytes().decode()
