"""In TOML a model file has a table for each module, with the fields of ``ModuleSizes``.

They have the names and the defaults of Megatron's TransformerConfig, GPTModel and
DistributedDataParallelConfig; above the tables stands what all modules have:

    params_dtype = "bf16"              # or "fp16", "fp32"
    use_distributed_optimizer = true
    grad_reduce_in_fp32 = true

    [vision]
    num_layers = 24
    hidden_size = 1024
    num_attention_heads = 16
    patch_size = 588                   # numbers of a patch, which a linear layer embeds
    tokens_per_image = 576             # inside; output_tokens_per_image if fewer come out
    images_per_sample = 1.5            # on average; max_images_per_sample for the memory
    frozen = false

    [language]
    num_layers = 32
    hidden_size = 4096
    num_attention_heads = 32
    num_query_groups = 8
    ffn_hidden_size = 14336
    gated_linear_unit = true
    vocab_size = 128256                # with padding
    seq_length = 4096
"""

import tomllib
from pathlib import Path
from typing import Any

from attrs import define, fields_dict

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.layout.problems import Problem, language_problems
from megatron_mimo_coord.layout.toml_tables import TomlFile, table_problems
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.size_problems import size_problems

LAYOUT = fields_dict(ModuleParallelism).keys() - fields_dict(ModuleSizes).keys()
DESCRIPTION = __doc__
"""What stands in such a file, for the help of a command."""


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
    file.refuse("is no model")
    return file.sizes


@define(slots=False)
class ModelFile(TomlFile):
    """What a file says about a model.

    Args:
        sizes: of each module whose table is right.
    """

    CONTENT = "a table for each module, such as [vision], and in it lines such as num_layers = 24"

    sizes: dict[str, ModuleSizes]

    @classmethod
    def of(cls, path: Path, text: str) -> "ModelFile":
        """What a file with this text says."""
        tables = tomllib.loads(text)
        modules = {name: table for name, table in tables.items() if _is_module(name, table)}
        shared = {name: tables[name] for name in tables.keys() - modules.keys()}
        problems = table_problems("", shared, ModuleSizes, "size")
        wrong = {field for problem in problems for _, field in problem.places}
        shared = {name: value for name, value in shared.items() if name not in wrong}
        sizes = {}
        for name, table in modules.items():
            if isinstance(table, dict) and (
                of_layout := [each for each in table if each in LAYOUT]
            ):
                said = (
                    f"{name} has {', '.join(of_layout)}, as a layout: write it into --layout FILE"
                )
                problems.append(Problem(said, (name, of_layout[0])))
                table = {field: table[field] for field in table if field not in LAYOUT}
            found = table_problems(name, table, ModuleSizes, "size", example="32", known=shared)
            problems += found
            if not found:
                sizes[name] = ModuleSizes(**{**shared, **table})
        problems += language_problems(modules)
        for name, module in sizes.items():
            problems += size_problems(name, module)
        return cls(path, text, problems, sizes)


def _is_module(name: str, value: Any) -> bool:
    """Whether something is a table, well written or not."""
    return isinstance(value, dict) or (
        isinstance(value, list) and name not in fields_dict(ModuleSizes)
    )
