"""Plain text from every rank to the first one."""

import torch
import torch.distributed as dist

from megatron_mimo_coord.world.device import world_device


def gather_text(text: str) -> list[str]:
    """The texts of all ranks, in their order, on rank 0; an empty list elsewhere. Collective.

    Example:
        >>> gather_text("what this rank has to say")
        ['what this rank has to say']
    """
    device = world_device()
    payload = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    lengths = length.new_empty((dist.get_world_size(),))
    dist.all_gather_into_tensor(lengths, length)
    sizes = lengths.tolist()
    padded = payload.new_zeros((max(sizes),))
    padded[: payload.numel()] = payload
    is_first = dist.get_rank() == 0
    parts = [torch.empty_like(padded) for _ in sizes] if is_first else None
    dist.gather(padded, parts, dst=0)
    return [
        part[:size].cpu().numpy().tobytes().decode()
        for part, size in zip(parts or [], sizes, strict=is_first)
    ]
