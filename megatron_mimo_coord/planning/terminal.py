"""What the commands share: arguments, tables, and an end that says what went wrong."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import megatron_mimo_coord

STDOUT = Path("-")
UNITS = {"B": 1, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30, "TB": 1e12}


class Parser(argparse.ArgumentParser):
    """A command line; what is wrong with it is JSON where that is asked for.

    Args:
        name: of the command.
        description: what it is for.
        epilog: an example, and its exit codes.
        problems_as_json: of one message, all that the command prints with ``--json``; None for the
            message alone.
    """

    def __init__(
        self,
        name: str,
        description: str | None,
        epilog: str,
        problems_as_json: Callable[[str], Any] | None = None,
    ) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=description, epilog=epilog, formatter_class=form)
        version = f"%(prog)s {megatron_mimo_coord.__version__}"
        self.add_argument("--version", action="version", version=version)
        self._as_json, self._is_json = problems_as_json, False

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line, by default the one that this process was started with."""
        self._is_json = "--json" in (sys.argv if arguments is None else arguments)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """End with code 2 and a message."""
        if not self._is_json or not self._as_json:
            super().error(message)
        print_json(self._as_json(message))
        raise SystemExit(2)

    def refuse_same_files(
        self, options: argparse.Namespace, read: Iterable[str], written: Iterable[str]
    ) -> None:
        """No file is written over another."""
        known: dict[Path, str] = {}
        for name in (*read, *written):
            if path := getattr(options, name):
                if path.resolve() in known and name in written:
                    other = known[path.resolve()]
                    self.error(f"--{name} {path} is the {other} too: give another file")
                known[path.resolve()] = name


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or not 1 <= len(text) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def size(text: str) -> float:
    """An argument that is a size of memory, in bytes.

    Example:
        >>> size("80GB"), size("1.5GiB")
        (80000000000.0, 1610612736.0)
    """
    digits = text.rstrip("BiGMT")
    try:
        value = float(digits) * UNITS[text[len(digits) :]]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value < 1e18:
        raise argparse.ArgumentTypeError(f"must be a size such as 80GB or 80GiB, not {text!r}")
    return value


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


def write_problem(option: str, path: Path, text: str) -> str:
    """Write what an option asks for, ``-`` being the terminal; returns what went wrong, if any."""
    if path == STDOUT:
        sys.stdout.write(text)
        return ""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"{option} {path} cannot be written: {error.strerror}; give another file"
    return ""


def end(head: str = "", problems: Iterable[str] = ()) -> NoReturn:
    """End with code 2 and a message, if there is one, with a line for each problem."""
    if head:
        print("\n".join([head, *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
    sys.exit(2)


def print_json(said: Any) -> None:
    """The answer for scripts."""
    print(json.dumps(said, indent=2))


def table(rows: Sequence[Sequence[str]], title: str = "", numbers: bool = False) -> list[str]:
    """The lines of a table, as wide as it is: a number cut off is no use.

    Args:
        rows: text of each cell, of several lines perhaps; the first row are titles.
        title: above the table.
        numbers: whether cells but the first are set to the right.

    Example:
        >>> print(*table([("", "step\\nseconds"), ("vision", "1.5")], numbers=True), sep="\\n")
                      step
                   seconds
         ──────────────────
          vision       1.5
    """
    titles, *below = ([cell.split("\n") for cell in row] for row in rows)
    height = max(map(len, titles))
    above = zip(*([""] * (height - len(lines)) + lines for lines in titles), strict=True)
    cells = [*above, *(line for row in below for line in zip_longest(*row, fillvalue=""))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligns = [str.rjust if numbers and index else str.ljust for index in range(len(widths))]
    lines = [
        "  " + "   ".join(map(lambda align, *cell: align(*cell), aligns, row, widths))
        for row in cells
    ]
    rule = " " + "─" * (sum(widths) + 3 * len(widths) - 1)
    return [*([title, ""] if title else []), *lines[:height], rule, *lines[height:]]


def beside(tables: Sequence[Sequence[str]]) -> list[str]:
    """Lines of several tables, next to each other."""
    widths = [max(map(len, lines)) for lines in tables]
    return [
        "  ".join(map(str.ljust, lines, widths)) for lines in zip_longest(*tables, fillvalue="")
    ]


def print_parts(*parts: Sequence[str]) -> None:
    """Print lines, with a blank one between the parts."""
    print("\n\n".join("\n".join(map(str.rstrip, part)) for part in parts))
