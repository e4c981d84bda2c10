"""When something happened on this rank's device, without making the host wait for it."""

from time import perf_counter
from typing import Any

import torch


class Clock:
    """Takes marks now, and tells later how far apart they were: where work is done at once."""

    def __init__(self) -> None:
        self._start = self.mark()

    def mark(self) -> Any:
        """This moment of the device's work."""
        return perf_counter()

    def seconds(self, mark: Any) -> float:
        """Seconds from the clock's start to a mark; may wait for the device."""
        return float(mark - self._start)


class DeviceClock(Clock):
    """CUDA events on the current stream: no mark makes the host wait."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        super().__init__()

    def mark(self) -> torch.cuda.Event:
        """The point of the current stream's work that has been launched by now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Seconds from the clock's start to a mark, for which the host waits."""
        mark.synchronize()
        return self._start.elapsed_time(mark) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, started now."""
    return DeviceClock() if device.type == "cuda" else Clock()
