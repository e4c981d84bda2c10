"""Costs in a file: what Python takes, and every problem at once with its line."""

from math import inf

import pytest

from megatron_mimo_coord.planning import Cluster, ModuleCosts
from megatron_mimo_coord.planning.costs_file import CostsFile

GOOD = """\
[vision]
forward_seconds_per_sample = 0.01
backward_seconds_per_sample = 2
frozen = true
layers_per_stage = [
    7,
    8,
]
[language]
forward_seconds_per_sample = 0
backward_seconds_per_sample = 0.5
[cluster]
ranks_per_node = 8
network_bytes_per_second = inf
"""
BAD = {  # line: (what stands there, what is said about it)
    1: ("latency = 1", "latency is in no table; put it below a line such as [vision]"),
    2: ("[vision]", "vision has no backward_seconds_per_sample; write"),
    3: ("forward_seconds_per_sample = -1", "must be a number, 0 or more, got -1"),
    4: ("forward_seconds = 1", "did you mean forward_seconds_per_sample?"),
    5: ("recompute = 1", "must be true or false, got 1"),
    6: ("imbalance = 0.5", "must be a number, 1 or more, got 0.5"),
    7: ("layers_per_stage = [1, 0]", "a number above 0 for each pipeline stage"),
    8: ("tensor_parallel_efficiency = 1.5", "a number above 0 and at most 1, got 1.5"),
    9: ("activation_gradient_share = nan", "a number from 0 to 1, got nan"),
    10: ("[cluster]", ""),
    11: ("node_bytes_per_second = 0", "must be a number above 0, got 0"),
    12: ("ranks_per_node = 0", "must be a positive integer"),
    13: ("network_latency_seconds = inf", "must be a number, 0 or more, got inf"),
    14: ("['a b']", "module name 'a b' must be made of"),
}


def test_a_file_means_what_python_means(tmp_path):
    file = tmp_path / "costs.toml"
    file.write_text(GOOD)
    vision = ModuleCosts(
        forward_seconds_per_sample=0.01,
        backward_seconds_per_sample=2,
        frozen=True,
        layers_per_stage=[7, 8],
    )
    language = ModuleCosts(forward_seconds_per_sample=0, backward_seconds_per_sample=0.5)
    cluster = Cluster(ranks_per_node=8, network_bytes_per_second=inf)
    told = CostsFile.read(file).told
    assert Cluster(**told.pop("cluster")) == cluster
    assert {name: ModuleCosts(**table) for name, table in told.items()} == {
        "vision": vision,
        "language": language,
    }


def test_every_problem_is_told_with_its_line(tmp_path):
    file = tmp_path / "costs.toml"
    file.write_text("\n".join(line for line, _ in BAD.values()))
    read = CostsFile.read(file)
    told = [read.located(problem) for problem in read.problems]
    expected = {number: said for number, (_, said) in BAD.items() if said}
    assert len(told) == len(expected)
    for line in told:
        number = int(line.split(":")[1].split()[0])
        assert expected[number] in line, line


def test_what_is_no_toml_is_refused(tmp_path):
    file = tmp_path / "costs.toml"
    file.write_text("[vision")
    with pytest.raises(ValueError, match=r"is not TOML: .* write a table for each module"):
        CostsFile.read(file)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        CostsFile.read(tmp_path / "no such file")
