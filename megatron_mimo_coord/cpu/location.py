"""Which line of a program did it."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

_HERE = str(Path(__file__).parent) + os.sep
_TORCH = f"{os.sep}torch{os.sep}"


def caller() -> str:
    """``file:line`` of the innermost frame that is neither PyTorch's nor this room's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and _TORCH not in name and "contextlib" not in name:
            break
        frame = frame.f_back
    path = frame.f_code.co_filename.split(os.sep)
    return f"{os.sep.join(path[-3:])}:{frame.f_lineno}"


def this_rank() -> int:
    """This rank of the world."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
