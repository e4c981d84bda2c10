"""Ranks that do not mean the same job say so, all of them, at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import world

from megatron_mimo_coord.world.consistency import RankFacts, disagreements

texts = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
statements = st.builds(RankFacts, texts, st.dictionaries(st.text(max_size=5), texts, max_size=3))


@given(statements, statements)
def test_rows_differ_exactly_where_facts_do(left, right):
    same = dict(left.job) == dict(right.job) and dict(left.modules) == dict(right.modules)
    assert (left.row() == right.row()) == same


@given(st.lists(statements, min_size=1, max_size=4))
def test_ranks_that_agree_have_nothing_to_say(some):
    assert disagreements([some[0]] * 3) == []


def test_the_sentence_says_who_has_what():
    here, there = RankFacts({"topology": "a"}, {}), RankFacts({"topology": "b"}, {})
    assert disagreements([here, there, here, here]) == [
        "topology: rank 1 has b, ranks 0, 2, 3 have a"
    ]


def test_a_module_that_a_rank_does_not_know_is_said_once_and_not_by_field():
    two = RankFacts({"the modules": "a, b", "a: tp": "1", "b: tp": "1", "b: dp": "2"}, {})
    one = RankFacts({"the modules": "a", "a: tp": "1"}, {})
    assert disagreements([two, one]) == ["the modules: rank 0 has a, b, rank 1 has a"]
    lacking = RankFacts({"the modules": "a, b", "a: tp": "1", "b: tp": "1"}, {})
    assert disagreements([two, lacking]) == ["b: dp: rank 0 has 2, rank 1 has nothing"]


def test_a_problem_of_one_rank_is_told_to_all():
    fine, broken = RankFacts({}, {}), RankFacts({}, {}, ["the moon is missing"])
    assert disagreements([fine, broken]) == ["the moon is missing (says rank 1)"]


def _agree(kind: str) -> list[int]:
    import torch.distributed as dist

    from megatron_mimo_coord.world.consistency import check_consistency

    rank = dist.get_rank()
    modules = {"vision": {"overlap": "False"}} if rank < 2 else {"language": {}}
    job, problems = {"layout": "x"}, []
    if kind == "job" and rank == 3:
        job = {"layout": "y", "more": "z"}
    if kind == "module" and rank == 1:
        modules = {"vision": {"overlap": "True"}}
    if kind == "number of modules" and rank == 0:
        modules = {"vision": {"overlap": "False"}, "audio": {}}
        job = {"layout": "three modules"}
    if kind == "problem" and rank == 2:
        problems = ["language is not wrapped"]
    return check_consistency(lambda: RankFacts(job, modules, problems, flags=rank))


def test_flags_of_all_ranks_reach_all_ranks():
    assert world(4).run("test_consistency:_agree", "nothing") == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("job", "layout: rank 3 has y, ranks 0, 1, 2 have x"),
        ("module", "vision: overlap: rank 0 has False, rank 1 has True"),
        ("number of modules", "layout: rank 0 has three modules"),
        ("problem", "language is not wrapped (says rank 2)"),
    ],
)
def test_every_rank_raises_the_same_sentence(kind, message):
    answers, errors = world(4).try_run("test_consistency:_agree", kind)
    assert not answers
    assert all(name == "ValueError" and message in text for name, text in errors.values())
