"""What the commands share: arguments, tables, and an end that says what went wrong."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.table import Table

STDOUT = Path("-")


def answer(command: Callable[[], None]) -> None:
    """Run a command; exit code 1 if its answer cannot be written, silently down a closed pipe."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        if not isinstance(error, BrokenPipeError):  # whoever read it has seen enough
            print(f"the answer cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or not 1 <= len(text) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def write_file(option: str, path: Path, text: str) -> None:
    """Write what an option asks for; ``-`` is the terminal."""
    if problem := write_problem(option, path, text):
        end(problem)


def write_problem(option: str, path: Path, text: str) -> str:
    """Write what an option asks for; returns what went wrong, if anything did."""
    if path == STDOUT:
        sys.stdout.write(text)
        return ""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"{option} {path} cannot be written: {error.strerror}; give another file"
    return ""


def end(message: str) -> NoReturn:
    """End with code 2 and a message."""
    print(message, file=sys.stderr)
    sys.exit(2)


def need_rich() -> None:
    """End with code 2 and what to install, if tables cannot be drawn."""
    try:
        import rich  # noqa: F401
    except ImportError:
        end(
            "the tables are drawn by rich, which is not installed: pip install rich (this "
            "package's extra 'cli'), or ask for --json"
        )


def drawn(
    titles: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: bool = False
) -> "Table":
    """A table.

    Args:
        titles: of the columns.
        rows: text of each cell.
        title: above the table.
        numbers: whether cells but the first are set to the right.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(titles):
        justify = "right" if numbers and index else "left"
        result.add_column(Text(name), no_wrap=True, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*map(Text, row))
    return result


def print_tables(headline: str, *parts: "Table", beside: Sequence["Table"] = ()) -> None:
    """Print a line and tables, as wide as they are: a number cut off is no use.

    Args:
        headline: the line.
        parts: tables, one below the other.
        beside: tables that may stand side by side, below those.
    """
    from rich.columns import Columns
    from rich.console import Console

    console = Console(highlight=False)
    unlimited = console.options.update(width=10_000)
    tables = (*parts, *beside)
    widths = [console.measure(part, options=unlimited).maximum for part in tables]
    least = console.width if console.is_terminal else 120
    console.size = max(least, *widths), console.height
    console.print(headline, soft_wrap=True, markup=False)
    for part in parts:
        console.print(part)
    if beside:
        console.print(Columns(beside))
