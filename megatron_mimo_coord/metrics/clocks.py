"""When something happened on this rank's device, without making the host wait for it."""

from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Takes marks now, and tells later how far apart they were."""

    def mark(self) -> Any:
        """This moment of the device's work."""

    def seconds(self, mark: Any) -> float:
        """Seconds from the clock's start to a mark; may wait for the device."""


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, started now."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class HostClock:
    """For ranks whose work is done when a call returns."""

    def __init__(self) -> None:
        self._start = perf_counter()

    def mark(self) -> float:
        """This moment."""
        return perf_counter()

    def seconds(self, mark: float) -> float:
        """Seconds from the clock's start to a mark."""
        return mark - self._start


class DeviceClock:
    """CUDA events on the current stream: no mark makes the host wait."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._start = self.mark()

    def mark(self) -> torch.cuda.Event:
        """The point of the current stream's work that has been launched by now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Seconds from the clock's start to a mark, for which the host waits."""
        mark.synchronize()
        return self._start.elapsed_time(mark) / 1000
