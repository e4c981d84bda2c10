"""A model in a TOML file: a table for each module, with the fields of ``ModuleSizes``.

    params_dtype = "bf16"               # above the tables: what all modules have
    use_distributed_optimizer = true

    [vision]
    num_layers = 24
    hidden_size = 1024
    num_attention_heads = 16
    patch_size = 588
    tokens_per_image = 576
    images_per_sample = 1.5

    [language]
    num_layers = 32
    hidden_size = 4096
    num_attention_heads = 32
    vocab_size = 32000
    seq_length = 4096

What is left out has Megatron's default.
"""

import tomllib
from pathlib import Path
from typing import Any

from attrs import NOTHING, define, fields_dict

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.layout.problems import Problem, module_problems, raise_problems
from megatron_mimo_coord.layout.toml_tables import TomlFile, field_message
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.size_problems import size_problems

FIELDS = fields_dict(ModuleSizes)
NEEDED = [name for name, field in FIELDS.items() if field.default is NOTHING]


def read_model(path: str | Path) -> dict[str, ModuleSizes]:
    """The sizes of each module.

    Args:
        path: a TOML file with a table for each module, one of them ``[language]``.

    Raises:
        ValueError: the file cannot be read or what is in it is no model; the message lists every
            problem with its line in the file.

    Example:
        >>> file = Path(folder, "model.toml")
        >>> _ = file.write_text(
        ...     "num_layers = 2\\n[language]\\nhidden_size = 64\\nnum_attention_heads = 4\\n"
        ...     "vocab_size = 128\\nseq_length = 32\\n"
        ... )
        >>> read_model(file)["language"].ffn_hidden_size
        256
    """
    file = ModelFile.read(path)
    raise_problems(f"{path} is no model", [file.located(problem) for problem in file.problems])
    return file.sizes


@define(slots=False)
class ModelFile(TomlFile):
    """What a file says about a model.

    Args:
        sizes: of each module whose table is right.
        problems: what is wrong.
    """

    CONTENT = "a table for each module, such as [vision], and in it lines such as num_layers = 24"

    sizes: dict[str, ModuleSizes]
    problems: list[Problem]

    @classmethod
    def of(cls, path: Path, text: str) -> "ModelFile":
        """What a file with this text says."""
        tables = tomllib.loads(text)
        shared = {name: value for name, value in tables.items() if not isinstance(value, dict)}
        messages = _messages("", shared)
        good = {field: value for field, value in shared.items() if field not in messages}
        problems = [Problem(message, ("", field)) for field, message in messages.items()]
        sizes = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                continue
            messages = _messages(name, table)
            found = module_problems({name: ModuleParallelism()})
            found += [Problem(message, (name, field)) for field, message in messages.items()]
            found += [
                Problem(f"{name} has no {field}; write {field} = 32, say", (name, ""))
                for field in NEEDED
                if field not in good and field not in table
            ]
            if not found:
                sizes[name] = ModuleSizes(**{**good, **table})
            problems += found
        if LANGUAGE not in tables:
            names = ", ".join(name for name in tables if name not in shared) or "none"
            problems.append(
                Problem(
                    f"there is no module named {LANGUAGE!r} (modules: {names}); Megatron's "
                    f"MimoModel needs exactly one, under that name: write [{LANGUAGE}]"
                )
            )
        return cls(path, text, sizes, problems + size_problems(sizes))


def _messages(module: str, table: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the lines of a table, or with those above all tables."""
    messages = {}
    for field, value in table.items():
        if isinstance(value, dict):
            message = f"a module is a table of its own: write [{field}]"
        elif not module and field not in FIELDS and isinstance(value, list):
            message = (
                f"module {field} must be one table: write [{field}], with one bracket each side"
            )
        else:
            message = field_message(FIELDS, "size", field, value)
        if message:
            messages[field] = message
    return messages
