"""Where a program waits for the device, and where it must not."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mimo_coord.cpu.location import caller, this_rank

_inside: list[bool] = []


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Reading a device tensor on the host is an error inside, on CPU ranks that rehearse.

    So is whatever else makes the host wait: ``torch.cuda.synchronize``, a mask as an index, copies
    of host memory to the device without ``non_blocking``. It is what
    ``torch.cuda.set_sync_debug_mode("error")`` is on GPUs.

    Raises:
        RuntimeError: at the line that waits, which it names.

    Example:
        >>> with no_host_sync():
        ...     total = torch.ones(2, device="cuda").sum()
    """
    _inside.append(True)
    try:
        yield
    finally:
        _inside.pop()


@contextmanager
def host_sync_allowed() -> Iterator[None]:
    """For what reads on a CPU where a GPU's own code does not."""
    before, _inside[:] = list(_inside), []
    try:
        yield
    finally:
        _inside[:] = before


def is_forbidden() -> bool:
    """Whether the host must not wait here."""
    return bool(_inside)


def waits_for_device(what: str) -> None:
    """Called wherever the host would wait for a GPU."""
    if _inside:
        raise RuntimeError(
            f"rank {this_rank()}: {what} at {caller()} makes the host wait for the device, inside "
            f"no_host_sync(): keep the value on the device, or read it later"
        )
