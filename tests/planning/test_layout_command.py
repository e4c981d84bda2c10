"""The command that looks at a layout: what it shows, what it refuses, and that it costs little."""

import json
import os
import re
import subprocess
import sys
import tomllib
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import pytest

import megatron_mimo_coord
from megatron_mimo_coord import ModuleParallelism
from megatron_mimo_coord.layout import pack
from megatron_mimo_coord.planning import layout_command as command
from megatron_mimo_coord.planning.drawing import Block

FAN_IN = """\
[vision]
data_parallel_size = 4

[language]
tensor_model_parallel_size = 2
pipeline_model_parallel_size = 2
data_parallel_size = 2
"""
BATCH = ("--global-batch-size", "512", "--micro-batch-size", "32")


@pytest.fixture
def look(tmp_path, monkeypatch, capsys):
    """Run the command on a layout; what it exits with, and its two outputs."""
    monkeypatch.chdir(tmp_path)

    def look(layout: str, *options: str) -> tuple[int, str, str]:
        Path("layout.toml").write_text(layout)
        try:
            command.main(["layout.toml", *options])
        except SystemExit as end:
            return (end.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return look


# -- a layout that can run -------------------------------------------------------------------------


def test_a_layout_is_shown_with_its_numbers_and_ranks(look):
    code, shown, complaints = look(FAN_IN, *BATCH)
    assert (code, complaints) == (0, "")
    assert "12 ranks, modules on disjoint ranks; 3 pipeline stages" in shown
    assert "32 samples in each of 16 microbatches" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["vision", "0-3", "1", "1", "1", "4", "8", "2", "fan-in", "4:2"] in rows
    assert ["language", "4-11", "2", "1", "2", "2", "16", "1"] in rows
    assert ["dp", "1", "1", "dp", "1", "6-7", "10-11"] in rows


def test_the_first_line_says_who_shares_ranks(look):
    apart = "rank_offset = 2\n[audio]\nrank_offset = 2\n[video]\nrank_offset = 3\n"
    _, shown, _ = look(f"[language]\ndata_parallel_size = 2\n[vision]\n{apart}")
    assert "4 ranks, modules on disjoint ranks, but vision and audio share rank 2; " in shown
    _, shown, _ = look("[vision]\nrank_offset = 0\n[language]\nrank_offset = 0\n")
    assert "1 rank, modules colocated; " in shown


def test_json_says_the_same(look):
    code, shown, _ = look(FAN_IN, "--json", *BATCH)
    summary = json.loads(shown)
    assert code == 0
    assert summary["ranks"] == 12
    assert summary["pipeline_depth"] == 3
    assert summary["num_microbatches"] == 16
    vision = summary["modules"]["vision"]
    assert (vision["first_rank"], vision["last_rank"]) == (0, 3)
    assert vision["samples_per_rank_and_microbatch"] == 8
    assert vision["gradient_scaling_factor"] == 2.0
    assert vision["bridge"] == "fan-in 4:2"
    assert vision["stages"] == [[0, 3]]
    assert summary["modules"]["language"]["stages"] == [[4, 7], [8, 11]]
    assert summary["modules"]["language"]["bridge"] is None


def test_a_loss_per_token_is_scaled_by_tokens(look):
    _, shown, _ = look(FAN_IN, "--per-token-loss")
    assert shown.count("1/tokens") == 2


def test_the_batch_and_the_loss_may_stand_in_the_file(look):
    job = "global_batch_size = 512\nmicro_batch_size = 32\ncalculate_per_token_loss = true\n"
    assert look(job + FAN_IN) == look(FAN_IN, "--per-token-loss", *BATCH)
    assert "32 samples in each of 16 microbatches; per-token loss" in look(job + FAN_IN)[1]
    assert (
        "8 samples in each of 64 microbatches" in look(job + FAN_IN, "--micro-batch-size", "8")[1]
    )


def test_a_microbatch_alone_is_dealt_out(look):
    code, shown, _ = look(FAN_IN, "--json", "--micro-batch-size", "32")
    summary = json.loads(shown)
    assert (code, summary["num_microbatches"]) == (0, None)
    assert summary["modules"]["vision"]["samples_per_rank_and_microbatch"] == 8


def test_colocated_modules_have_one_stage(look):
    code, shown, _ = look("[vision]\nrank_offset = 0\n[language]\nrank_offset = 0\n", "--json")
    summary = json.loads(shown)
    assert (code, summary["colocated"], summary["pipeline_depth"]) == (0, True, 1)


def test_expert_sizes_are_shown_where_there_are_experts(look):
    _, shown, _ = look("[language]\ndata_parallel_size = 4\nexpert_model_parallel_size = 4\n")
    rows = [line.split() for line in shown.splitlines()]
    assert ["language", "0-3", "1", "1", "1", "4", "4", "1", "1/4", "1"] in rows
    assert "expert TP" not in look(FAN_IN)[1]


def test_the_picture_has_each_rank_under_its_stage_and_beside_its_replica(look, tmp_path):
    code, _, _ = look(FAN_IN, "--svg", "layout.svg")
    svg = ElementTree.parse(tmp_path / "layout.svg").getroot()
    texts = [
        (text.text, float(text.get("x")), float(text.get("y")))
        for text in svg.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert code == 0
    assert [text for text, _, y in texts if y == 13] == ["vision: fan-in 4:2 \u2192", "language"]
    middle = [text for text, _, _ in texts].index("language")
    halves = {"vision": texts[:middle], "language": texts[middle:]}
    cells = {}
    for module, drawn in halves.items():
        stages = {x: text for text, x, _ in drawn if text.startswith("stage")}
        replicas = {y: text for text, _, y in drawn if text.startswith("dp")}
        cells |= {
            (module, stages[x], replicas[y]): text
            for text, x, y in drawn
            if x in stages and y in replicas
        }
    assert cells == {
        **{("vision", "stage 0", f"dp {rank}"): str(rank) for rank in range(4)},
        ("language", "stage 0", "dp 0"): "4-5",
        ("language", "stage 0", "dp 1"): "6-7",
        ("language", "stage 1", "dp 0"): "8-9",
        ("language", "stage 1", "dp 1"): "10-11",
    }
    boxes = [path.get("d") for path in svg.iter("{http://www.w3.org/2000/svg}path")]
    assert len(boxes) == 4 + 4
    for text, x, y in texts:
        around = [box for box in boxes if is_inside(x, y, box)]
        assert len(around) == (text in cells.values()), text


def test_a_rank_that_two_modules_share_has_both_in_its_box(look, tmp_path):
    """Vision TP 2 on the first ranks, or all, of a language model of TP 2, PP 2, DP 2."""
    vision = "[vision]\nrank_offset = 0\ntensor_model_parallel_size = 2\ndata_parallel_size = {}\n"
    language = FAN_IN[FAN_IN.index("[language]") :] + "rank_offset = 0\n"
    _, shown, _ = look(vision.format(2) + language, "--svg", "layout.svg")
    lines = [line.split() for line in shown.splitlines()]
    start = lines.index(["language,", "vision"])
    assert lines[start + 4 :] == [
        ["dp", "0", "0-1", "4-5"], ["vision", "dp", "0"],
        ["dp", "1", "2-3", "6-7"], ["vision", "dp", "1"],
    ]  # fmt: skip
    _, wide, _ = look(vision.format(4) + language)
    assert wide.splitlines()[-1].split() == ["vision", "dp", "1", "vision", "dp", "3"]
    svg = ElementTree.parse(tmp_path / "layout.svg").getroot()
    boxes = [path.get("d") for path in svg.iter("{http://www.w3.org/2000/svg}path")]
    within = [
        [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")
         if is_inside(float(text.get("x")), float(text.get("y")), box)]
        for box in boxes
    ]  # fmt: skip
    assert within == [["0-1", "vision dp 0"], ["4-5"], ["2-3", "vision dp 1"], ["6-7"]]


def is_inside(x: float, y: float, path: str) -> bool:
    left, top, width, height = map(float, re.match(r"M(\S+) (\S+)h(\S+?)v(\S+?)h", path).groups())
    return left < x < left + width and top < y < top + height


def test_the_picture_goes_down_a_pipe(look, tmp_path):
    look(FAN_IN, "--svg", "layout.svg")
    assert look(FAN_IN, "--svg", "-") == (0, (tmp_path / "layout.svg").read_text(), "")


def test_every_rank_is_in_its_cell():
    language = ModuleParallelism(
        tensor_model_parallel_size=3, pipeline_model_parallel_size=2, data_parallel_size=4
    )
    grid = pack({"vision": ModuleParallelism(data_parallel_size=5), "language": language})[
        "language"
    ]
    rows = Block.of(grid).rows
    for rank in grid.ranks:
        first, last = map(
            int, rows[grid.coordinate(rank, "dp")][1 + grid.coordinate(rank, "pp")].split("-")
        )
        assert first <= rank <= last


def test_only_the_ends_of_a_long_module_are_drawn():
    grid = pack({"language": ModuleParallelism(data_parallel_size=100_000)})["language"]
    numbers = ["0", "1", "2", "…", "99998", "99999"]
    titles = [number if number == "…" else f"dp {number}" for number in numbers]
    assert Block.of(grid).rows == list(map(list, zip(titles, numbers, strict=True)))


# -- a layout that cannot --------------------------------------------------------------------------


def test_ranks_left_over_and_what_would_use_them(look):
    code, shown, complaints = look(FAN_IN, "--world-size", "16")
    assert (code, shown) == (2, "")
    assert "  - ranks 12-15 of 16 are in no module" in complaints
    assert "  - [vision] data_parallel_size = 8\n" in complaints
    code, shown, _ = look(
        FAN_IN,
        "--world-size",
        "16",
        "--json",
        "--global-batch-size",
        "12",
        "--micro-batch-size",
        "4",
    )
    found = json.loads(shown)
    assert code == 2
    assert found["idle_ranks"] == [[12, 15]]
    assert {"vision": {"data_parallel_size": 8}} not in found["fits"], "4 samples for 8 ranks"
    assert {"vision": {"tensor_model_parallel_size": 2}} in found["fits"]


@pytest.mark.parametrize(
    "layout", [FAN_IN, "[vision]\nrank_offset = 0\n[language]\nrank_offset = 0\n"]
)
def test_every_way_that_is_offered_runs(look, layout):
    offered = 0
    for world_size in range(1, 40):
        _, shown, _ = look(layout, "--world-size", str(world_size), "--json")
        for way in json.loads(shown).get("fits", []):
            tables = tomllib.loads(layout)
            for module, sizes in way.items():
                tables[module] |= sizes
            changed = [
                f"{module}.{field} = {size}"
                for module, sizes in tables.items()
                for field, size in sizes.items()
            ]
            assert look("\n".join(changed), "--world-size", str(world_size))[0] == 0, way
            sizes = {
                name: tomllib.loads("\n".join(changed))[name] for name in ("vision", "language")
            }
            ranks = {
                name: prod(size for field, size in each.items() if field != "rank_offset")
                for name, each in sizes.items()
            }
            shared = "rank_offset" in layout
            assert (max if shared else sum)(ranks.values()) == world_size, way
            offered += 1
    assert offered > 30, "a way for most worlds"


MANY_FAULTS = """\
stray = 3
[vision]
data_parallel_size = 4
tensor_parallel = 2
pipeline_model_parallel_size = 0
[audio]
data_parallel_size = 3
[language]
tensor_model_parallel_size = 2
data_parallel_size = 2
expert_model_parallel_size = 1
"""


def test_all_problems_are_listed_with_their_places(look):
    code, shown, complaints = look(MANY_FAULTS)
    assert (code, shown) == (2, "")
    for part in (
        "layout.toml:1 stray: stray is 3 where a table belongs",
        "layout.toml:4 [vision] tensor_parallel: there is no size 'tensor_parallel'; did you mean tensor_model_parallel_size?",
        "layout.toml:5 [vision] pipeline_model_parallel_size: pipeline_model_parallel_size must be a positive integer below 2**31, got 0",
        "layout.toml:7 [audio] data_parallel_size, layout.toml:10 [language] data_parallel_size: audio has DP 3",
    ):
        assert part in complaints
    assert complaints.count("  - ") == 4
    assert len(json.loads(look(MANY_FAULTS, "--json")[1])["problems"]) == 4


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("[vision]\n", (), "there is no module named 'language'"),
        ("", (), "layout.toml [language]: there is no module named 'language' (modules: none); Megatron's MimoModel needs exactly one, under that name: add [language]\n"),
        ("[llm]\n", (), "add [language], or rename the language model"),
        ("[vision]\n[language]\nrank_offset = 3\n", (), "layout.toml:3 [language] rank_offset: ranks 1-2 are in no module; make a module larger or move"),
        ("[language]\ndata_parallel_size = 2147483647\ntensor_model_parallel_size = 2\n", (), "layout.toml:1 [language]: the layout takes 4,294,967,294 ranks"),
        ("language = 4\n", (), "layout.toml:1 language: language is 4 where a table belongs; begin the module with a line [language]"),
        ("batch_size = 4\n[language]\n", (), "layout.toml:1 batch_size: there is no 'batch_size' of the whole job; did you mean micro_batch_size?"),
        ("per_token_loss = true\n[language]\n", (), "did you mean calculate_per_token_loss?"),
        ("micro_batch_size = true\n[language]\n", (), "layout.toml:1 micro_batch_size: micro_batch_size must be a positive integer"),
        ("[micro_batch_size]\n[language]\n", (), "layout.toml:1 micro_batch_size: micro_batch_size must be a positive integer"),
        ("calculate_per_token_loss = 1\n[language]\n", (), "layout.toml:1 calculate_per_token_loss: calculate_per_token_loss must be true or false"),
        ("[language]\nmicro_batch_size = 4\n", (), "layout.toml:2 [language] micro_batch_size: micro_batch_size is of the whole job; put it above"),
        ("micro_batch_size = 7\n[language]\ndata_parallel_size = 2\n", (), "layout.toml:3 [language] data_parallel_size, layout.toml:1 micro_batch_size: micro_batch_size 7 is not divisible"),
        ("micro_batch_size = 8\n[language]\ndata_parallel_size = 2\n", ("--micro-batch-size", "7"), "layout.toml:3 [language] data_parallel_size: micro_batch_size 7 is not divisible"),
        ("global_batch_size = 8\n[language]\n", (), "layout.toml:1 global_batch_size: global_batch_size says nothing without micro_batch_size"),
        ("[language\n", (), "layout.toml is not TOML"),
        ("[modules.language]\n", (), "layout.toml:1 [modules] language: a module is a table of its own: write [language]"),
        ('["a.b"]\n[language]\n', (), "layout.toml:1 [a.b]: module name 'a.b' must be made of letters"),
        ("[language]\nrank_offset = -1\n", (), "layout.toml:2 [language] rank_offset"),
        ("[language]\nexpert_model_parallel_size = 2\n", (), "layout.toml:2 [language] expert_model_parallel_size"),
        ('language.data_parallel_size = "2"\n', (), "layout.toml:1 [language] data_parallel_size"),
        ("[language]\nrank_offset = [\n  1,\n]\n", (), "layout.toml:2 [language] rank_offset"),
        ("# a\u2028b\n[language]\ndata_parallel_size = 0\n", (), "layout.toml:3 [language] data_parallel_size"),
        ("\ufeff[language]\ndata_parallel_size = 0\n", (), "layout.toml:2 [language] data_parallel_size"),
        ("[[vision]]\n[language]\n", (), "must be one table: write [vision], with one bracket"),
        ("[Language]\n", (), "rename Language"),
        ("[language]\nexpert_tensor_parallel_size = 2\n", (), "layout.toml:2 [language] expert_tensor_parallel_size"),
        ("data_parallel_size = 3\n[language]\n", (), "data_parallel_size is in no module; put it below a line such as [vision]"),
        ("[language]\ndata_parallel_size = 1" + 400 * "0", (), "got an integer of 1329 bits"),
        ("x = " + 3000 * "[" + 3000 * "]", (), "layout.toml is not TOML"),
        ('["[/red]"]\n[language]\n', (), "module name '[/red]' must be made of letters"),
        (FAN_IN, ("--svg", "layout.toml"), "--svg layout.toml is the layout too"),
        (FAN_IN, ("--svg", "/dev/full"), "--svg /dev/full cannot be written: No space left on device"),
        (FAN_IN, ("--svg", "."), "--svg . cannot be written: Is a directory"),
        (FAN_IN, ("--world-size", "11"), "launch at least 12 ranks"),
        ("[language]\ntensor_model_parallel_size = 2\n", ("--world-size", "13"), "no other size"),
        ("[vision]\ncontext_parallel_size = 2\n[language]\n", (), "layout.toml:2 [vision] context_parallel_size"),
        (FAN_IN, ("--world-size", "8"), "layout.toml:4 [language]: module language (ranks 4-11) needs"),
        (FAN_IN, ("--global-batch-size", "30", "--micro-batch-size", "30"), "layout.toml:2 [vision] data_parallel_size"),
        (FAN_IN, ("--global-batch-size", "32", "--micro-batch-size", "64"), "global_batch_size 32 is not a multiple of micro_batch_size 64"),
        (FAN_IN, ("--global-batch-size", "8"), "global_batch_size says nothing without micro_batch_size"),
        (FAN_IN, ("--svg", "-", "--json"), "both print"),
        (FAN_IN, ("--world-size", "0"), "must be a whole number, 1 or more"),
        (FAN_IN, ("--svg", "nowhere/layout.svg"), "--svg nowhere/layout.svg cannot be written: No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_exit_code_2(look, layout, options, message):
    code, shown, complaints = look(layout, *options)
    assert (code, shown) == (2, "")
    assert message in complaints


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["nothing.toml"])
    assert "nothing.toml cannot be read: No such file" in capsys.readouterr().err


def test_a_mistake_hides_no_other(look):
    layout = "[vision]\ndata_parallel_size = 4\ntypo = 1\n[language]\ndata_parallel_size = 4\n"
    _, _, complaints = look(layout, "--global-batch-size", "30", "--micro-batch-size", "7")
    for part in (
        "there is no size 'typo'",
        "layout.toml:5 [language] data_parallel_size: global_batch_size 30 is not divisible",
        "layout.toml:5 [language] data_parallel_size: micro_batch_size 7 is not divisible",
        "global_batch_size 30 is not a multiple of micro_batch_size 7",
    ):
        assert part in complaints
    wrong_size_alone = (
        '[language]\ntensor_model_parallel_size = "4"\nexpert_model_parallel_size = 4\n'
    )
    assert look(wrong_size_alone)[2].count("  - ") == 1


def test_json_tells_the_places_apart(look):
    _, shown, _ = look(
        "[vision]\ndata_parallel_size = 2\n[language]\ndata_parallel_size = 3\n", "--json"
    )
    (problem,) = json.loads(shown)["problems"]
    assert problem["message"].startswith("vision has DP 2 and language has DP 3")
    assert problem["places"] == [
        {"module": "vision", "field": "data_parallel_size", "line": 2},
        {"module": "language", "field": "data_parallel_size", "line": 4},
    ]


# -- where it is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["20", "80"])
def test_no_rank_is_cut_off_in_a_narrow_terminal(look, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    layout = "[vision]\ndata_parallel_size = 131072\n[language]\npipeline_model_parallel_size = 6\ndata_parallel_size = 131072\n"
    _, shown, _ = look(layout)
    for ranks in ("0-131071", "131072-917503", "917503", "one to one 131072:131072"):
        assert ranks in shown


@pytest.mark.parametrize(
    ("layout", "options"),
    [("[language]\n", []), ("[language]\n", ["--svg", "-"]), ("", ["--json"])],
    ids=["table", "picture", "problems"],
)
def test_a_full_disk(tmp_path, layout, options):
    file = tmp_path / "layout.toml"
    file.write_text(layout)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_mimo_coord", str(file), *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    said = "the answer cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_and_a_reader_that_leaves(tmp_path, encoding):
    layout = tmp_path / "layout.toml"
    layout.write_text("[language]\ndata_parallel_size = 1000\n")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    run = [sys.executable, "-m", "megatron_mimo_coord", str(layout)]
    done = subprocess.run(run, env=environment, capture_output=True, timeout=60, check=True)
    assert b"dp 999" in done.stdout and not done.stderr
    left = subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    left.stdout.close()
    assert left.stderr.read() == b""
    assert left.wait(60) == 1


# -- what it costs ---------------------------------------------------------------------------------


def test_it_starts_without_torch(tmp_path):
    layout = tmp_path / "layout.toml"
    layout.write_text(FAN_IN)
    code = (
        "import sys, runpy; "
        f"sys.argv = ['mimo-layout', {str(layout)!r}]; "
        "runpy.run_module('megatron_mimo_coord', run_name='__main__'); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version(look):
    assert look("", "--version") == (0, f"mimo-layout {megatron_mimo_coord.__version__}\n", "")


def test_the_installed_command_is_the_same():
    done = subprocess.run(
        [Path(sys.executable).parent / "mimo-layout", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "a layout file has a table for each module" in done.stdout


def test_a_hundred_thousand_ranks_cost_no_more_than_ten(look):
    """Counted, not timed: lines of this package that run."""

    def lines(replicas: int) -> int:
        layout = f"[vision]\ndata_parallel_size = {replicas}\n[language]\ndata_parallel_size = {replicas}\n"
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            ours = "megatron_mimo_coord" in frame.f_code.co_filename
            count += ours
            return trace if ours else None

        sys.settrace(trace)
        try:
            assert look(layout, "--svg", "layout.svg")[0] == 0
        finally:
            sys.settrace(None)
        return count

    assert lines(50_000) == lines(10)


def test_many_problems_are_found_in_one_pass(look, monkeypatch):
    """Counted, not timed: a file with twice the lines is parsed twice as often, not four times."""

    def parsed(modules: int) -> int:
        count = 0
        loads = tomllib.loads

        def counting(text: str) -> dict:
            nonlocal count
            count += len(text)
            return loads(text)

        monkeypatch.setattr(tomllib, "loads", counting)
        layout = "".join(f"[e{100 + i}]\ndata_parallel_size = 3\n" for i in range(modules))
        _, _, complaints = look(layout + "[language]\ndata_parallel_size = 2\n")
        monkeypatch.setattr(tomllib, "loads", loads)
        assert complaints.count("neither divides") == modules
        return count

    assert parsed(100) < 2.1 * parsed(50)
