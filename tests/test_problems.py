"""Layouts that cannot run are refused with a sentence, whatever is wrong with them."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import world
from test_layout import runs

from megatron_mimo_coord import ModuleParallelism
from megatron_mimo_coord.batch import batch_problems
from megatron_mimo_coord.layout import LANGUAGE, default_topology, pack
from megatron_mimo_coord.problems import layout_problems, module_problems, raise_problems

garbage = st.sampled_from([0, -1, -(10**30), 1.0, 2.5, "2", "", None, True, [], {}, float("nan")])
huge = st.sampled_from([2**31, 2**63, 10**30])
few = st.integers(1, 4)
sizes = st.one_of(few, few, few, few, few, few, few, few, garbage, huge)
FIELDS = [
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "data_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
]
modules = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(FIELDS, sizes), "rank_offset": st.integers(0, 9) | sizes}
)
names = st.sampled_from(["vision", "audio", LANGUAGE, LANGUAGE])
odd_names = st.sampled_from(["", "a.b", 3, None])
layouts = st.dictionaries(st.one_of(*[names] * 9, odd_names), modules, max_size=3)
topologies = st.one_of(
    *[st.just("default")] * 9,
    st.sampled_from([3, {"vision": "language"}, {LANGUAGE: [LANGUAGE]}, {"vision": ["moon"]}]),
)
batches = st.tuples(*[st.integers(1, 24) | garbage | huge] * 3) | st.just((24, 12, 2))

A_CURE = re.compile(
    r"must |use |change |make |launch |set |choose |needs |give |write |instead", re.IGNORECASE
)


def refuse(layout: dict, topology: Any, world_size: Any, batch: tuple) -> None:
    """What a user's mistakes go through, from the sizes to the batch."""
    built = {name: ModuleParallelism(**sizes) for name, sizes in layout.items()}
    raise_problems("these are no modules", module_problems(built))
    topology = default_topology(built) if topology == "default" else topology
    raise_problems("cannot run", layout_problems(pack(built), topology, world_size))
    raise_problems("cannot be dealt out", batch_problems(pack(built).values(), *batch))


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_good(layout: dict, topology: Any, world_size: Any, batch: tuple) -> bool:
    """By definition, without the code under test."""
    for name, module in layout.items():
        if not isinstance(name, str) or not name or "." in name:
            return False
        for field, value in module.items():
            if field in ("rank_offset", "expert_tensor_parallel_size") and value is None:
                continue
            if not is_whole(value) or value < (field != "rank_offset") or value > 2**30:
                return False
        tp, cp, _, dp, ep, expert_tp = (module.get(field) or 1 for field in FIELDS)
        if tp * cp * dp % (ep * (expert_tp if module.get(FIELDS[5]) else tp)):
            return False
    if topology != "default" or not is_whole(world_size) or world_size < 1:
        return False
    placed = pack({name: ModuleParallelism(**sizes) for name, sizes in layout.items()})
    total, micro, number = batch
    return (
        runs(placed, default_topology(placed), world_size)
        and all(is_whole(value) and value > 0 for value in batch)
        and total == micro * number
        and all(micro % grid.data_parallel_size == 0 for grid in placed.values())
    )


refused = 0


@settings(max_examples=10_500)
@given(layouts, topologies, st.integers(1, 16) | garbage, batches)
def check_one(layout, topology, world_size, batch):
    global refused
    if is_good(layout, topology, world_size, batch):
        refuse(layout, topology, world_size, batch)
        return
    with pytest.raises(ValueError) as error:
        refuse(layout, topology, world_size, batch)
    assert len(str(error.value)) > 40
    assert A_CURE.search(str(error.value))
    refused += 1


def test_ten_thousand_bad_layouts_are_refused_with_a_sentence():
    check_one()
    assert refused >= 10_000


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
        ({"a.b": ONE, "language": ONE}, {}, "module name 'a.b' must be text without a dot"),
        ({1: ONE, "language": ONE}, {}, "module name 1 must be text without a dot"),
        ({"language": ModuleParallelism(data_parallel_size=10**30)}, {}, "but the world has 2 ranks"),
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
