"""Costs in a TOML file: a table for each module, and one for what joins the ranks.

    [vision]
    forward_seconds_per_sample = 0.011
    backward_seconds_per_sample = 0.023
    output_bytes_per_sample = 4194304

    [language]
    forward_seconds_per_sample = 0.09
    backward_seconds_per_sample = 0.18

    [cluster]
    ranks_per_node = 8
    network_bytes_per_second = 50e9

The fields are those of ``ModuleCosts`` and ``Cluster``; what is left out has its default, as in
Python, but for the two that every module needs.
"""

import tomllib
from pathlib import Path
from typing import Any

from attrs import define

from megatron_mimo_coord.layout.toml_tables import TomlFile, table_problems
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts

CLUSTER = "cluster"
"""Name of the table that is no module's."""


@define(slots=False)
class CostsFile(TomlFile):
    """What a file says about costs.

    Args:
        told: the fields that stand in each table with nothing wrong, with their values.
    """

    CONTENT = (
        "a table for each module, such as [vision], and in it lines such as "
        "forward_seconds_per_sample = 0.01"
    )

    told: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path, text: str) -> "CostsFile":
        """What a file with this text says."""
        told, problems = {}, []
        for name, table in tomllib.loads(text).items():
            kind = Cluster if name == CLUSTER else ModuleCosts
            found = table_problems(name, table, kind, "cost", example="0.01")
            problems += found
            if not found:
                told[name] = table
        return cls(path, text, problems, told)
