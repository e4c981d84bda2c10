"""What predict_and_measure.py makes of its numbers; its jobs take minutes and do not run here."""

import pytest
from predict_and_measure import LAYOUTS, Comparison, as_toml, judge

from megatron_mimo_coord.layout import default_topology, pack, ranks_taken
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.layout.toml_file import LayoutFile


def comparisons(*pairs: tuple[float, float]) -> list[Comparison]:
    return [
        Comparison(f"layout {index}", 2, predicted, measured, counts=True)
        for index, (predicted, measured) in enumerate(pairs)
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_runs(name, tmp_path):
    layout = LayoutFile.of(tmp_path / "layout.toml", as_toml(LAYOUTS[name]))
    assert not layout.problems
    grids = pack(layout.modules)
    size = ranks_taken(grids.values())
    assert not layout_problems(grids, default_topology(grids), size)
    assert size <= 8


def test_good_predictions_pass(capsys):
    assert not judge(comparisons((1.0, 1.05), (2.0, 1.9), (3.0, 3.9)))
    assert "median error 5.3% of 3 layouts; 3 of 3 pairs" in capsys.readouterr().out


def test_bad_predictions_do_not(capsys):
    assert judge(comparisons((1.0, 1.3), (2.0, 2.5), (3.0, 3.0)))


def test_the_wrong_order_does_not_pass(capsys):
    assert judge(comparisons((1.0, 1.0), (1.2, 1.19), (1.35, 1.18), (1.0, 1.0), (1.0, 1.0)))
    assert "not in order: layout 1; layout 2" in capsys.readouterr().out


def test_layouts_that_are_alike_may_come_in_any_order():
    assert not judge(comparisons((1.0, 1.0), (1.09, 0.99)))
