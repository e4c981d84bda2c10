"""TOML files of tables with the fields of an attrs class, and the line of whatever is wrong."""

import tomllib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from attrs import Attribute, define

from megatron_mimo_coord.layout.problems import Problem


@define(slots=False)
class TomlFile:
    """A file of tables, and where in it each table and field stands.

    Args:
        path: the file.
        text: all that is in it.
    """

    CONTENT: ClassVar[str]
    """What to write into such a file, as the end of a sentence."""

    path: Path
    text: str

    @classmethod
    @abstractmethod
    def of(cls, path: Path, text: str) -> Self:
        """What a file with this text says."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ValueError: there is no such file, or it is not TOML.
        """
        try:
            return cls.of(Path(path), Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}; give another file"
            ) from error
        except (ValueError, RecursionError) as error:  # neither UTF-8 nor TOML
            raise ValueError(f"{path} is not TOML: {error}; write {cls.CONTENT}") from error

    def located(self, problem: Problem) -> Problem:
        """A problem, with its places in the file in front."""
        places = [
            f"{self.path}{f':{line}' if line else ''}"
            f"{f' [{module}]' if module else ''}{f' {field}' if field else ''}"
            for module, field, line in self.places(problem)
        ]
        return Problem(": ".join([", ".join(places), problem]) if places else problem)

    def places(self, problem: Problem) -> Iterator[tuple[str, str, int | None]]:
        """(module, field, line) of all that a problem is about; the table's line if it has none.

        The module is empty for what stands above the tables, the line None for what is not in the
        file.
        """
        for module, field in problem.places:
            line = self._lines.get((module, field), self._lines.get((module, "")))
            if module or line:  # the batch may come from elsewhere than the file
                yield module, field, line

    @cached_property
    def _lines(self) -> dict[tuple[str, str], int]:
        """The line at which each table, and each field of it, comes into the file.

        A statement is as many lines as it takes to be TOML, below the header that it stands under.
        """
        lines: dict[tuple[str, str], int] = {}
        header, statement, start = "", "", 1
        for number, line in enumerate(self.text.split("\n"), 1):
            if not statement:
                start = number
            statement += line + "\n"
            try:
                tables = tomllib.loads(header + statement)
            except tomllib.TOMLDecodeError:
                continue  # it goes on in the next line
            for name, table in tables.items():
                lines.setdefault(("", name), start)
                if isinstance(table, dict):
                    for field in ("", *table):
                        lines.setdefault((name, field), start)
            if statement.lstrip().startswith("["):
                header = statement
            statement = ""
        return lines


def field_message(fields: "Mapping[str, Attribute[Any]]", what: str, field: str, value: Any) -> str:
    """What is wrong with a line of a table, if anything is: its name, or its value.

    Args:
        fields: those of the class, each with a validator.
        what: what a field is called.
        field: its name in the file.
        value: its value in the file.
    """
    if field not in fields:
        return f"there is no {what} {field!r}; {nearest(field, fields)}"
    check = fields[field].validator
    assert check, "every field has one"
    try:
        check(None, fields[field], value)
    except ValueError as error:
        return str(error)
    return ""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at what somebody may have meant.

    Example:
        >>> nearest("latency", ["latency_seconds", "bytes"]), nearest("x", ["one", "two"])
        ('did you mean latency_seconds?', 'use one of one, two')
    """
    names = list(names)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
