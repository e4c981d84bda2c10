"""TOML files of tables with the fields of an attrs class, and the line of whatever is wrong."""

import tomllib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from attrs import NOTHING, define, fields, fields_dict

from megatron_mimo_coord.layout.problems import Problem, name_problems, raise_problems


@define(slots=False)
class TomlFile:
    """A file of tables, and where in it each table and field stands.

    Args:
        path: the file.
        text: all that is in it.
        problems: what is wrong with it.
    """

    CONTENT: ClassVar[str]
    """What to write into such a file, as the end of a sentence."""

    path: Path
    text: str
    problems: list[Problem]

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

    def refuse(self, what: str) -> None:
        """Raise one ``ValueError`` that lists every problem with its line, if there is any."""
        raise_problems(f"{self.path} {what}", [self.located(each) for each in self.problems])

    def located(self, problem: Problem) -> Problem:
        """A problem, with its places in the file in front."""
        places = [
            f"{self.path}{f':{line}' if line else ''}"
            f"{f' [{module}]' if module else ''}{f' {field}' if field else ''}"
            for module, field, line in self.places(problem)
        ]
        return Problem(": ".join([", ".join(places), problem]) if places else problem)

    def as_json(self, problem: Problem) -> dict[str, Any]:
        """A problem in types that JSON knows."""
        names = ("module", "field", "line")
        places = [dict(zip(names, place, strict=True)) for place in self.places(problem)]
        return {"message": problem, "places": places, "text": self.located(problem)}

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


def as_problem(message: str) -> dict[str, Any]:
    """A problem that is in no file, in types that JSON knows."""
    return {"message": message, "places": [], "text": message}


def table_problems(
    module: str, table: Any, kind: type, what: str, *, example: str = "", known: Iterable[str] = ()
) -> list[Problem]:
    """What is wrong with a table that stands for an instance of an attrs class.

    Args:
        module: name of the table; empty for the lines above all tables.
        table: what stands in it.
        kind: the class, each field of which has a validator.
        what: what a field is called.
        example: a value for a field that is missing; empty if none need be there.
        known: fields that stand elsewhere.
    """
    if not isinstance(table, dict):
        cure = "is in no table; put it below a line such as [vision]"
        if isinstance(table, list):
            cure = f"must be one table: write [{module}], with one bracket on each side"
        return [Problem(f"{module} {cure}", ("", module))]
    fields = fields_dict(kind)
    if module and (problems := list(name_problems(module))):
        return problems
    problems = [
        Problem(f"{module} has no {field}; write {field} = {example}, say", (module, ""))
        for field in fields
        if example and fields[field].default is NOTHING and field not in {*table, *known}
    ]
    messages = {field: field_message(kind, what, field, value) for field, value in table.items()}
    return problems + [
        Problem(message, (module, field)) for field, message in messages.items() if message
    ]


def field_message(kind: type, what: str, field: str, value: Any) -> str:
    """What is wrong with a line of a table, if anything is: its name, or its value."""
    fields = fields_dict(kind)
    if field not in fields:
        if isinstance(value, dict):
            return f"a module is a table of its own: write [{field}]"
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


def table_text(name: str, instance: Any, usual: Mapping[str, Any] = {}) -> str:
    """A table with the fields of an instance of an attrs class, without those that are as usual.

    Args:
        name: of the table.
        instance: of a class whose fields are numbers and flags, or lists of them.
        usual: what a field is that is left out, where that is not its default.

    Example:
        >>> @define
        ... class Sizes:
        ...     data: int = 1
        ...     pipeline: int = 1
        >>> print(table_text("vision", Sizes(data=2)))
        [vision]
        data = 2
        <BLANKLINE>
    """
    lines = [f"[{name}]\n"]
    for each in fields(type(instance)):
        value = getattr(instance, each.name)
        if value != usual.get(each.name, each.default):
            shown = f"{value:.6g}" if isinstance(value, float) else str(value).lower()
            lines.append(f"{each.name} = {shown}\n")
    return "".join(lines)
