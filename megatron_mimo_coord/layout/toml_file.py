"""In TOML a layout file has a table for each module, with the fields of ``ModuleParallelism``.

    [vision]
    data_parallel_size = 4

    [language]
    tensor_model_parallel_size = 2
    pipeline_model_parallel_size = 2
    data_parallel_size = 2

What is left out has its default, as in Python. Above the tables may stand global_batch_size,
micro_batch_size and calculate_per_token_loss, which the whole job has.
"""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attrs import define, fields_dict, frozen

from megatron_mimo_coord.layout.fields import count, flag, shown
from megatron_mimo_coord.layout.grids import default_topology, pack
from megatron_mimo_coord.layout.parallelism import ModuleParallelism
from megatron_mimo_coord.layout.problems import Problem, layout_problems, name_problems
from megatron_mimo_coord.layout.toml_tables import TomlFile, field_message, table_text

DESCRIPTION = __doc__
"""What stands in such a file, for the help of a command."""


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
    layout.refuse("cannot run")
    return layout.modules


def layout_text(modules: Mapping[str, ModuleParallelism], job: Mapping[str, Any]) -> str:
    """What :func:`read_layout` reads: a file with these modules, without what has its default.

    Args:
        modules: parallel sizes of each module.
        job: what else the file says, above the tables.

    Example:
        >>> language = ModuleParallelism(data_parallel_size=2)
        >>> print(layout_text({"language": language}, {"global_batch_size": 8}))
        global_batch_size = 8
        <BLANKLINE>
        [language]
        data_parallel_size = 2
        <BLANKLINE>
    """
    parts = ["".join(f"{field} = {value}\n" for field, value in job.items())]
    for name, module in modules.items():
        usual = {"expert_tensor_parallel_size": module.tensor_model_parallel_size}
        parts.append(table_text(name, module, usual))
    return "\n".join(filter(None, parts))


@frozen
class _Job:
    """What stands above the tables."""

    global_batch_size: int = count(None, "write a number of samples, such as 32")
    micro_batch_size: int = count(None, "write a number of samples, such as 32")
    calculate_per_token_loss: bool = flag()


FIELDS, JOB_FIELDS = fields_dict(ModuleParallelism), fields_dict(_Job)
EXPERT_FIELDS = ("expert_model_parallel_size", "expert_tensor_parallel_size")


@define(slots=False)
class LayoutFile(TomlFile):
    """What a file says about modules.

    Args:
        path: the file.
        text: all that is in it.
        modules: sizes of each module; a size that is wrong has its default.
        job: what stands above the tables.
        problems: what is wrong with the tables and their sizes, not with how they fit together on
            a world: that only ``problems_on`` can tell.
    """

    CONTENT = (
        "a table for each module, such as [vision], and in it lines such as data_parallel_size = 4"
    )

    modules: dict[str, ModuleParallelism]
    job: dict[str, Any]

    @classmethod
    def of(cls, path: Path, text: str) -> "LayoutFile":
        """What a file with this text says."""
        modules, job, problems = {}, {}, []
        for name, value in tomllib.loads(text).items():
            if isinstance(value, dict) and name not in JOB_FIELDS:
                modules[name], found = _module(name, value)
                problems += found
            elif message := _job_message(name, value):
                problems.append(Problem(message, ("", name)))
            else:
                job[name] = value
        return cls(path, text, problems, modules, job)

    @property
    def broken(self) -> set[str]:
        """Modules whose table or sizes are wrong."""
        return {module for problem in self.problems for module, _ in problem.places}

    def problems_on(self, world_size: int | None) -> list[Problem]:
        """All that keeps the layout from running on a world, None for one of just its size."""
        grids = pack(self.modules)
        found = layout_problems(grids, default_topology(grids), world_size)
        places = {place for problem in self.problems for place in problem.places}
        if any(field not in JOB_FIELDS for _, field in places):
            found = [problem for problem in found if self._is_certain(problem)]
        return [*self.problems, *found]

    def _is_certain(self, problem: Problem) -> bool:
        """Whether a problem stays when wrong sizes, which also move ranks, are mended."""
        misplaced = {field for each in self.problems for _, field in each.places}
        return bool(problem.places) and all(
            (module not in self.modules and module not in misplaced)
            or (
                module in self.modules
                and module not in self.broken
                and field in ("data_parallel_size", "context_parallel_size")
            )
            for module, field in problem.places
        )


def _job_message(name: str, value: Any) -> str:
    """What is wrong with a line that stands above all tables, if anything is."""
    if name in JOB_FIELDS:
        return field_message(_Job, "size", name, value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"module {name} must be one table: write [{name}], with one bracket on each side"
    near = get_close_matches(name, (*FIELDS, *JOB_FIELDS), n=1, cutoff=0.6)
    if near and near[0] in JOB_FIELDS:
        return f"there is no {name!r} of the whole job; did you mean {near[0]}?"
    if near:
        return f"{name} is in no module; put it below a line such as [vision], which begins one"
    return (
        f"{name} is {shown(value)} where a table belongs; begin the module with a line [{name}] "
        f"and write lines such as data_parallel_size = 4 below it"
    )


def _module(name: str, table: dict[str, Any]) -> tuple[ModuleParallelism, list[Problem]]:
    """A module's sizes, and what is wrong with them."""
    problems = list(name_problems(name))
    for size, value in table.items():
        if size in JOB_FIELDS:
            message = f"{size} is of the whole job; put it above the first table"
        else:
            message = field_message(ModuleParallelism, "size", size, value)
        problems += [Problem(message, (name, size))] if message else []
    wrong = {size for problem in problems for _, size in problem.places}
    sizes = {size: value for size, value in table.items() if size not in wrong}
    dense = {size: value for size, value in sizes.items() if size not in EXPERT_FIELDS}
    if len(sizes) < len(table):  # whether the experts fit depends on all sizes
        return ModuleParallelism(**dense), problems
    try:
        return ModuleParallelism(**sizes), problems
    except ValueError as error:
        places = [(name, size) for size in EXPERT_FIELDS if size in table]
        return ModuleParallelism(**dense), [*problems, Problem(str(error), *places)]
