"""A layout in a TOML file: a table for each module, with the fields of ``ModuleParallelism``.

    [vision]
    data_parallel_size = 4

    [language]
    tensor_model_parallel_size = 2
    data_parallel_size = 2

What a size or an offset leaves out has its default, as in Python.
"""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attrs import fields_dict, frozen

from megatron_mimo_coord.layout import ModuleParallelism, default_topology, pack
from megatron_mimo_coord.problems import Problem, layout_problems, module_problems, raise_problems

FIELDS = fields_dict(ModuleParallelism)
SIZES = [name for name in FIELDS if name.endswith("_size")]


def read_layout(path: str | Path) -> dict[str, ModuleParallelism]:
    """The parallel sizes of each module, for ``MegatronMIMOInfra.build``.

    Args:
        path: a TOML file with a table for each module, one of them ``[language]``.

    Raises:
        ValueError: the file cannot be read or what is in it is no layout; the message lists every
            problem with its line in the file.

    Example:
        >>> file = Path(folder, "layout.toml")
        >>> _ = file.write_text("[vision]\\ndata_parallel_size = 2\\n[language]\\n")
        >>> layout = read_layout(file)
        >>> layout["vision"].data_parallel_size, layout["language"].data_parallel_size
        (2, 1)
    """
    layout = LayoutFile.read(path)
    raise_problems(f"{path} cannot run", [layout.locate(problem) for problem in layout.problems])
    return layout.modules


@frozen
class LayoutFile:
    """What a file says about modules.

    Args:
        path: the file.
        text: all that is in it.
        modules: sizes of each module; a size that is wrong has its default.
        problems: what is wrong with the tables and their sizes, not with how they fit together on
            a world: that only ``layout_problems`` can tell.
    """

    path: Path
    text: str
    modules: dict[str, ModuleParallelism]
    problems: list[Problem]

    @classmethod
    def read(cls, path: str | Path) -> "LayoutFile":
        """Read a file.

        Raises:
            ValueError: there is no such file, or it is not TOML.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            tables = tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # neither UTF-8 nor TOML
            raise ValueError(
                f"{path} is not TOML: {error}; write a table for each module, such as [vision], "
                f"and in it lines such as data_parallel_size = 4"
            ) from error
        modules, problems = {}, []
        for name, table in tables.items():
            modules[name], found = _module(name, table)
            problems += found
        return cls(Path(path), text, modules, problems)

    def problems_on(self, world_size: int | None) -> list[Problem]:
        """All that keeps the layout from running on a world, None for one of just its size."""
        grids = pack(self.modules)
        ranks = max((grid.ranks.stop for grid in grids.values()), default=1)
        found = layout_problems(grids, default_topology(grids), world_size or ranks)
        if self.problems:  # a wrong size moves ranks: only what does not depend on them is certain
            broken = {module for problem in self.problems for module, _ in problem.places}
            found = [
                problem
                for problem in found
                if problem.places
                and all(
                    module not in broken and (field in SIZES or module not in self.modules)
                    for module, field in problem.places
                )
            ]
        return [*self.problems, *found]

    def locate(self, problem: Problem) -> Problem:
        """A problem, with its places in the file in front."""
        places = [self._place(*place) for place in problem.places]
        return Problem(": ".join([", ".join(places) or str(self.path), problem]), *problem.places)

    def _place(self, module: str, field: str) -> str:
        line = self._line(module, field) or self._line(module)
        where = f"{self.path}:{line}" if line else f"{self.path}"
        return f"{where} [{module}] {field}".rstrip()

    def _line(self, module: str, field: str = "") -> int | None:
        """The line that brings a module, or a field of it, into the file.

        That is the last line of the shortest beginning of the file that holds it.
        """
        lines = self.text.splitlines()
        for number in range(1, len(lines) + 1):
            try:
                tables = tomllib.loads("\n".join(lines[:number]))
            except tomllib.TOMLDecodeError:
                continue  # this line goes on in the next
            if module in tables and (not field or field in tables[module]):
                return number
        return None


def _module(name: str, table: Any) -> tuple[ModuleParallelism, list[Problem]]:
    """A module's sizes, and what is wrong with them."""
    if not isinstance(table, dict):
        return ModuleParallelism(), [
            Problem(
                f"{name} = {table!r} is in no module; put it below a line such as [vision]",
                (name, ""),
            )
        ]
    problems = module_problems({name: ModuleParallelism()})
    sizes = {}
    for field, value in table.items():
        if isinstance(value, dict):
            problems.append(
                Problem(f"a module is a table of its own: write [{field}]", (name, field))
            )
            continue
        if field not in FIELDS:
            near = get_close_matches(field, FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(FIELDS)}"
            problems.append(Problem(f"there is no size {field!r}; {hint}", (name, field)))
            continue
        check = FIELDS[field].validator
        assert check, "every size has one"
        try:
            check(None, FIELDS[field], value)
            sizes[field] = value
        except ValueError as error:
            problems.append(Problem(f"{error}", (name, field)))
    try:
        return ModuleParallelism(**sizes), problems
    except ValueError as error:
        place = (name, "expert_model_parallel_size")
        return ModuleParallelism(), [*problems, Problem(str(error), place)]
