"""Layouts that cannot run are refused with a sentence, whatever is wrong with them."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from attrs import asdict
from ranks import world

from megatron_mimo_coord import ModuleParallelism
from megatron_mimo_coord.layout import LANGUAGE, default_topology, pack
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import layout_problems, module_problems
from megatron_mimo_coord.layout.toml_file import LayoutFile

DP, TP, PP = "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"
SIZES = [name for name in asdict(ModuleParallelism()) if name.endswith("_size")]
FAMILIES = {  # of problems, by a part of their sentence
    "a size": "must be a positive integer",
    "an offset": "must be a rank",
    "a field": "there is no size",
    "experts": "does not divide the",
    "a name": "must be made of letters",
    "no language model": "there is no module named 'language'",
    "no work": "in no module",
    "beyond the world": "needs ranks up to",
    "overlap": "overlap in part",
    "shared": "share their ranks",
    "colocated pipeline": "without a pipeline",
    "context parallelism": "CP must be 1",
    "bridge": "neither divides the other",
    "topology": "topology ",
    "a batch that does not divide": "is not divisible by the DP",
    "a batch": "not a multiple of micro_batch_size",
}
CURES = (
    "write ", "rename ", "use ", "change ", "make ", "launch ", "set ", "give ", "choose ",
    "did you mean", "put ", "add [",
)  # fmt: skip


def good(random: Random) -> dict:
    """What runs: modules, world size, topology and batch."""
    language_dp = random.choice([1, 2, 3, 4])
    colocated = random.choice([False, True])
    modules: dict[Any, dict] = {}
    for name in random.choice([[], ["vision"], ["vision", "audio"]]):
        dp = language_dp * random.choice([1, 2]) if random.choice([False, True]) else 1
        modules[name] = {DP: dp, TP: random.randint(1, 3), PP: random.randint(1, 2)}
    modules[LANGUAGE] = {DP: language_dp, TP: random.randint(1, 3), PP: random.randint(1, 3)}
    if colocated:
        modules = {name: {DP: language_dp, TP: 2, "rank_offset": 0} for name in modules}
    placed = pack({name: ModuleParallelism(**sizes) for name, sizes in modules.items()})
    micro = 24 * random.randint(1, 3)
    return {
        "modules": modules,
        "world_size": max(grid.ranks.stop for grid in placed.values()),
        "topology": default_topology(modules),
        "batch": [micro * random.randint(1, 4), micro],
    }


GARBAGE = [0, -1, 1.0, 2.5, "2", "", True, [], {}, float("nan"), 2**31, -(10**30), 10**5000]
FAULTS = ["size"] * 3 + [
    *("field", "offset", "name", "missing", "together", "world", "batch", "topology")
]


def broken(random: Random, job: dict) -> None:
    """Break one thing."""
    modules = job["modules"]
    name = random.choice(sorted(modules))
    fault = random.choice(FAULTS)
    if fault == "size":
        modules[name][random.choice(SIZES)] = random.choice(
            [random.randint(2, 7), random.choice(GARBAGE)]
        )
    if fault == "together":
        job["modules"] = {each: {DP: 2, PP: 2, "rank_offset": 0} for each in modules}
        job["world_size"] = 4
    if fault == "offset":
        modules[name]["rank_offset"] = random.choice(
            [random.randint(0, 30), random.choice(GARBAGE)]
        )
    if fault == "field":
        modules[name][random.choice(["tp", "dp", "data_parallel", "x"])] = 2
    if fault == "name":
        modules[random.choice(["", "a.b", "[red]", "a b", "vision\n", "ß"])] = modules.pop(name)
    if fault == "missing":
        del modules[name]
    if fault == "world":
        job["world_size"] = random.choice([random.randint(1, 40), random.choice(GARBAGE)])
    if fault == "batch":
        job["batch"][random.randint(0, 1)] = random.choice(
            [random.randint(1, 99), random.choice(GARBAGE)]
        )
    if fault == "topology":
        job["topology"] = random.choice(
            [3, "language", {LANGUAGE: [LANGUAGE]}, {"vision": "language"}, {"vision": 3}]
        )


def problems_in_python(job: dict) -> list[str]:
    """As a trainer meets them: sizes, layout, batch."""
    built = {}
    for name, sizes in job["modules"].items():
        try:
            built[name] = ModuleParallelism(**sizes)
        except (ValueError, TypeError) as error:  # Python's own for a keyword that is not there
            return [f"write {error}" if isinstance(error, TypeError) else str(error)]
    if module_problems(built):
        return [*module_problems(built)]
    placed = pack(built)
    return [
        *layout_problems(placed, job["topology"], job["world_size"]),
        *batch_problems(placed.values(), *job["batch"]),
    ]


def problems_in_file(job: dict) -> list[str]:
    """As the command meets them."""
    lines = []
    for name, sizes in job["modules"].items():
        lines.append(f"[{json.dumps(name, ensure_ascii=False)}]")
        lines += [f"{field} = {in_toml(size)}" for field, size in sizes.items()]
    layout = LayoutFile.of(Path("layout.toml"), "\n".join(lines))
    found = layout.problems_on(None)
    for problem in found:
        for module, field, line in layout.places(problem):
            assert line is None or f"[{json.dumps(module, ensure_ascii=False)}]" in lines[:line]
            assert line is None or not field or field in lines[line - 1] or "[" in lines[line - 1]
    return [layout.located(problem) for problem in found]


def in_toml(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return hex(value)
    return {"{}": "{}", "nan": "nan"}.get(str(value)) or json.dumps(value)


def is_good(job: dict) -> bool:
    """By definition, without the code under test."""
    from test_layout import runs

    for name, sizes in job["modules"].items():
        if not isinstance(name, str) or not name or set(name) - set("abcdefghijklmnopqrstuvwxyz"):
            return False
        for field, value in sizes.items():
            least = 0 if field == "rank_offset" else 1
            known = field in [*SIZES, "rank_offset"]
            if not known or type(value) is not int or not least <= value < 2**31:
                return False
        tp, cp, _, dp, ep, expert_tp = (sizes.get(field, 1) for field in SIZES)
        if tp * cp * dp % (ep * (expert_tp if SIZES[5] in sizes else tp)):
            return False
    placed = pack({name: ModuleParallelism(**sizes) for name, sizes in job["modules"].items()})
    if job["topology"] != default_topology(job["modules"]) or LANGUAGE not in placed:
        return False
    for number in (job["world_size"], *job["batch"]):
        if type(number) is not int or not 1 <= number < 2**31:
            return False
    total, micro = job["batch"]
    fits = all(micro % grid.data_parallel_size == 0 for grid in placed.values())
    return runs(placed, None, job["world_size"]) and total % micro == 0 and fits


def test_ten_thousand_bad_layouts_are_refused_with_a_sentence():
    seen: Counter = Counter()
    for seed in range(11_000):
        random = Random(seed)
        job = good(random)
        for _ in range(random.randint(1, 2)):
            if job["modules"]:
                broken(random, job)
        problems = problems_in_python(job)
        assert (not problems) == is_good(job), (seed, problems)
        if random.random() < 1 / 12:
            problems += problems_in_file(job)
        seen["bad"] += bool(problems)
        for problem in problems:
            assert any(cure in problem for cure in CURES), (seed, problem)
            seen.update(family for family, part in FAMILIES.items() if part in problem)
    assert seen["bad"] >= 10_000
    assert min(seen[family] for family in FAMILIES) >= 20, seen


def _build(layouts_and_topologies: list) -> list[str]:
    """What ``MegatronMIMOInfra.build`` says to each, and how many groups it left behind."""
    import torch.distributed as dist

    from megatron_mimo_coord import MegatronMIMOInfra

    said = []
    before = len(dist.distributed_c10d._world.pg_map)
    for layout, options in layouts_and_topologies:
        try:
            MegatronMIMOInfra.build(layout, **options).destroy()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    assert len(dist.distributed_c10d._world.pg_map) == before
    return said


ONE, TWO = ModuleParallelism(), ModuleParallelism(data_parallel_size=2)
FINE = {"vision": ONE, "language": ONE}


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (FINE, {}, ""),
        ({}, {}, "there is no module named 'language' (modules: none)"),
        (None, {}, "modules must map names to ModuleParallelism, got None"),
        ([ONE, ONE], {}, "modules must map names to ModuleParallelism"),
        ({"language": {"data_parallel_size": 2}}, {}, "module 'language' must be a ModuleParallelism"),
        ({"language": 2}, {}, "module 'language' must be a ModuleParallelism, got 2"),
        ({"a.b": ONE, "language": ONE}, {}, "module name 'a.b' must be made of letters"),
        ({1: ONE, "language": ONE}, {}, "module name 1 must be made of letters"),
        ({"language": ModuleParallelism(data_parallel_size=10**9)}, {}, "but the world has 2 ranks"),
        (FINE, {"topology": "language"}, "topology must map each module to a list of its targets"),
        (FINE, {"topology": {"vision": "language"}}, "topology sends vision to language"),
        (FINE, {"topology": {"vision": 3}}, "topology sends vision to 3"),
        (FINE, {"module_output_ndim": {"moon": 2}}, "module_output_ndim must give 2"),
        (FINE, {"module_output_ndim": {"vision": 4}}, "module_output_ndim must give 2"),
        (FINE, {"module_output_ndim": 2}, "module_output_ndim must give 2"),
    ],
)  # fmt: skip
def test_build_refuses_on_every_rank(layout, options, message):
    for (said,) in world(2).run("test_problems:_build", [(layout, options)]):
        assert message in said and bool(said) == bool(message)
