"""Tables of measured ratios: medians with their intervals, aligned or drawn by rich."""

import contextlib
import math
import statistics
import sys
from collections.abc import Sequence


def with_interval(values: Sequence[float]) -> str:
    """Median and its 95% interval, which assumes nothing about how the noise is distributed."""
    low, high = interval(values)
    return f"{statistics.median(values):.3f} ({low:.2f}-{high:.2f})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Values of the ranks n/2 -+ 0.98 sqrt(n): as many heads as n tosses of a coin give."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach) - 1)
    return ordered[low], ordered[-1 - low]


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table, drawn by rich on a terminal, else as aligned text."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return _show_rich(header, rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in (header, *rows):
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    return None


def _show_rich(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
