"""The command that proposes layouts: what it shows, writes and refuses."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from attrs import NOTHING, evolve, fields_dict
from cases import Case
from ranks import world

from megatron_mimo_coord import read_layout
from megatron_mimo_coord.planning import ModuleCosts, layout_command
from megatron_mimo_coord.planning import plan_command as command
from megatron_mimo_coord.planning.estimates import forward_flops
from megatron_mimo_coord.planning.measure import products
from megatron_mimo_coord.planning.model_file import read_model
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import layers_numel

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODEL = """\
params_dtype = "bf16"
use_distributed_optimizer = true
[vision]
num_layers = 4
hidden_size = 256
num_attention_heads = 4
patch_size = 588
tokens_per_image = 64
[language]
num_layers = 4
hidden_size = 512
num_attention_heads = 8
vocab_size = 1024
seq_length = 128
"""
REPEATED = "tensor_parallel_replicated_share"
ASKED = ("--gpus", "8", "--gpus-per-node", "4", "--global-batch-size", "12")
COSTS = """\
[vision]
forward_seconds_per_sample = 0.5
backward_seconds_per_sample = 1.5
[language]
forward_seconds_per_sample = 1
backward_seconds_per_sample = 2
"""


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Run the command on a model; what it exits with, and its two outputs."""
    monkeypatch.chdir(tmp_path)

    def ask(model: str, *options: str, **files: str) -> tuple[int, str, str]:
        Path("model.toml").write_text(model)
        for name, text in files.items():
            Path(f"{name}.toml").write_text(text)
        try:
            command.main(["model.toml", *options])
        except SystemExit as end:
            return (end.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return ask


# Two microbatches of 6 samples, one GPU for each module, messages and the optimizer for free:
#   vision    F0 0-3  F1 3-6  waits 6-21          B0 21-30  waits 30-39  B1 39-48
#   language          F0 3-9  B0 9-21    F1 21-27  B1 27-39
BY_HAND = """\
global_batch_size = 12
micro_batch_size = 6
[vision]
rank_offset = 1
[language]
"""
FREE = "[cluster]\nnode_latency_seconds = 0\nnode_bytes_per_second = inf\n"
COSTS_BY_HAND = COSTS.replace("_sample = 2\n", "_sample = 2\noptimizer_seconds = 0\n") + FREE
COSTS_BY_HAND = COSTS_BY_HAND.replace("[language]", "optimizer_seconds = 0\n[language]")


def test_the_numbers_of_a_layout_are_those_by_hand(ask):
    options = ("--layout", "layout.toml", "--costs", "costs.toml", "--gpus", "8")
    options += ("--gpus-per-node", "4", "--memory", "10GB", "--reserve", "3GB")
    files = {"layout": BY_HAND.replace("[language]", "[language]\nrank_offset = 0")}
    files["costs"] = COSTS_BY_HAND
    code, shown, complaints = ask(MODEL, *options, **files)
    assert (code, complaints) == (0, "")
    assert shown.startswith("8 GPUs, 4 a node; 12 samples a step; the layout as given\n")
    rows = [line.split() for line in shown.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["1"]]
    assert row[:8] == ["1", "1", "1", "1", "1", "1", "1", "6"], "layout, sizes, microbatch"
    # 12 samples in 48 s on a node of 4, of which 2 are used; busy are 24 s and 36 s
    assert row[8:16] == ["48", "0.25", "0.0625", "4", "own", "2", "50%", "25%"]
    held = [
        float(each[-1])
        for each in rows
        if each[:1] in (["vision"], ["language"]) and each[1:2] == ["0"]
    ]
    assert float(row[16]) == pytest.approx(7 - max(held), abs=0.06)
    files_written = ("--json", "--trace", "step.json", "--svg", "step.svg")
    (found,) = json.loads(ask(MODEL, *options, *files_written, **files)[1])["proposals"]
    assert found["step_seconds"] == pytest.approx(48)
    assert found["samples_per_second_per_allocated_gpu"] == pytest.approx(12 / 48 / 4)
    shares = {
        name: [(each["busy"], each["waiting"], each["idle"]) for each in module["stages"]]
        for name, module in found["modules"].items()
    }
    assert shares["vision"] == [pytest.approx((24 / 48, 24 / 48, 0))]
    assert shares["language"][0][0] == pytest.approx(36 / 48)
    assert [found["modules"][name]["ranks_idle"] for name in shares] == pytest.approx([0.5, 0.25])
    fullest = max(stage["total"] for each in found["modules"].values() for stage in each["stages"])
    assert found["headroom_bytes"] == pytest.approx(7e9 - fullest)
    events = [
        each
        for each in json.loads(Path("step.json").read_text())["traceEvents"]
        if each["ph"] == "X"
    ]
    computed = {
        (each["pid"], each["name"]): (each["ts"] / 1e6, each["dur"] / 1e6)
        for each in events
        if each["cat"] in ("forward", "backward")
    }
    assert computed == {
        (0, "forward 0"): (0, 3), (0, "forward 1"): (3, 3), (0, "backward 0"): (21, 9), (0, "backward 1"): (39, 9),
        (1, "forward 0"): (3, 6), (1, "backward 0"): (9, 12), (1, "forward 1"): (21, 6), (1, "backward 1"): (27, 12),
    }  # fmt: skip
    texts = [
        each.text for each in ElementTree.parse("step.svg").iter() if each.tag.endswith("text")
    ]
    assert [text for text in texts if "busy" in text] == ["50 % busy", "75 % busy"]
    assert [text for text in texts if text.endswith(" s")] == [f"{6 * tick} s" for tick in range(9)]


def test_stages_that_hold_the_same_share_a_row_of_the_memory(ask):
    layout = "global_batch_size = 12\nmicro_batch_size = 12\n[vision]\n[language]\n"
    layout += "pipeline_model_parallel_size = 4\n"
    big = MODEL.replace("hidden_size = 512", "hidden_size = 4096")
    shown = ask(big, "--layout", "layout.toml", layout=layout)[1]
    rows = [line.split() for line in shown.splitlines()]
    labels = [row[1:3] for row in rows if row[:1] == ["language"] and len(row) == 10]
    assert labels == [["0", "1"], ["1-2", "1"], ["3", "1"]]  # one microbatch is in flight
    held = json.loads(ask(big, "--layout", "layout.toml", "--json", layout=layout)[1])
    (stages,) = [each["modules"]["language"]["stages"] for each in held["proposals"]]
    parts = ("weights", "gradients", "optimizer", "activations", "working", "messages", "total")
    (middle,) = [row[3:] for row in rows if row[:2] == ["language", "1-2"]]
    assert [float(cell) for cell in middle] == pytest.approx(
        [stages[1][part] / 1e9 for part in parts], abs=0.006
    )
    assert stages[1]["weights"] == pytest.approx(2 * (12 * 4096**2 + 13 * 4096), rel=1e-3)


def test_layouts_are_listed_as_json_lists_them(ask):
    code, shown, complaints = ask(MODEL, *ASKED)
    assert (code, complaints) == (0, "")
    assert "8 GPUs, 4 a node; 12 samples a step; the 10 best layouts" in shown
    assert max(map(len, shown.partition("assumed:")[0].splitlines())) <= 120
    known = json.loads(ask(MODEL, *ASKED, "--json")[1])
    for assumed in known["assumptions"]:
        assert f"  - {assumed}\n" in shown
    rows = [line.split() for line in shown.splitlines()]
    listed = [row for row in rows if len(row) == 17 and row[0].isdecimal()]
    assert len(listed) == len(known["proposals"]) == 10
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    for number, (row, told) in enumerate(zip(listed, known["proposals"], strict=True), 1):
        modules = told["modules"].values()
        shapes = [str(module[size]) for module in modules for size in sizes]
        assert row[:8] == [str(number), *shapes, str(told["micro_batch_size"])]
        assert float(row[8]) == pytest.approx(told["step_seconds"], rel=1e-3)
        assert row[11:14] == [
            str(told["allocated_gpus"]),
            "shared" if told["colocated"] or told["encoders_first"] else "own",
            str(told["empty_gpus"]),
        ]
        idle = [float(cell.rstrip("%")) / 100 for cell in row[14:16]]
        assert idle == pytest.approx([module["ranks_idle"] for module in modules], abs=0.006)
        assert float(row[16]) == pytest.approx(told["headroom_bytes"] / 1e9, abs=0.06)


def test_json_says_the_same(ask):
    found = json.loads(ask(MODEL, *ASKED, "--json")[1])
    times = [proposal["step_seconds"] for proposal in found["proposals"]]
    assert times == sorted(times)
    assert found["problems"] == [] and found["assumptions"]
    for proposal in found["proposals"]:
        assert proposal["samples_per_second"] == pytest.approx(12 / proposal["step_seconds"])
        assert proposal["allocated_gpus"] == 4 * -(-proposal["gpus"] // 4)
        assert proposal["empty_gpus"] == proposal["allocated_gpus"] - proposal["gpus"]
        for module in proposal["modules"].values():
            busy = [stage["busy"] for stage in module["stages"]]
            idle = 1 - sum(busy) / len(busy)
            shares = [stage["idle"] + stage["waiting"] for stage in module["stages"]]
            assert idle == pytest.approx(sum(shares) / len(shares))
            if proposal["colocated"] or proposal["encoders_first"]:
                assert module["ranks_idle"] < idle
            else:
                assert module["ranks_idle"] == pytest.approx(idle)
            for stage in module["stages"]:
                parts = ("weights", "gradients", "optimizer", "activations", "working", "messages")
                assert stage["total"] == pytest.approx(sum(stage[part] for part in parts))
                assert stage["rank_total"] <= 76e9 - proposal["headroom_bytes"]


def test_the_step_in_slices_is_longer_where_images_are_uneven(ask):
    uneven = MODEL.replace("patch_size", "images_per_sample_deviation = 1.5\npatch_size")
    layout = "global_batch_size = 32\nmicro_batch_size = 16\n[vision]\ndata_parallel_size = 4\n"
    layout += "rank_offset = 0\n[language]\ndata_parallel_size = 4\nrank_offset = 0\n"
    files = {"layout": layout, "costs": COSTS}
    options = ("--layout", "layout.toml", "--costs", "costs.toml", "--json")
    (even,) = json.loads(ask(MODEL, *options, **files)[1])["proposals"]
    (found,) = json.loads(ask(uneven, *options, **files)[1])["proposals"]
    assert even["step_seconds_in_slices"] == even["step_seconds"]
    work = 32 * (0.5 + 1.5) / 4  # of each rank's encoder
    known = ModuleCosts(
        forward_seconds_per_sample=0, backward_seconds_per_sample=0,
        images_per_sample=1, images_per_sample_deviation=1.5,
    )  # fmt: skip
    for assigned, key in ((True, "step_seconds"), (False, "step_seconds_in_slices")):
        more = evolve(known, images_assigned=assigned).unevenness(4, 16) - 1
        assert found[key] - even["step_seconds"] == pytest.approx(work * more, rel=1e-6)
    shown = ask(uneven, *options[:-1], **files)[1]
    assert f"{found['step_seconds_in_slices']:.4g}" in shown.split()


@pytest.mark.parametrize("costs", [(), ("--costs", "costs.toml")], ids=["estimated", "measured"])
def test_nothing_is_recomputed_where_memory_is_ample(ask, costs):
    """Encoders on the language model's ranks have the first of ways that take equally long."""
    options = (*ASKED, *costs, "--memory", "2000GB", "--json")
    found = json.loads(ask(MODEL, *options, costs=COSTS)[1])["proposals"]
    modules = next(
        each["modules"]
        for each in found
        if all(at["rank_offset"] == 0 for at in each["modules"].values())
    )
    assert [each["recompute_granularity"] for each in modules.values()] == [None, None]


def test_what_is_recomputed_is_part_of_the_answer(ask):
    tight = (*ASKED, "--memory", "48MB", "--reserve", "1MB", "--count", "3")
    found = json.loads(ask(MODEL, *tight, "--json")[1])["proposals"]
    recomputed = {
        each["modules"][name]["recompute_granularity"] for each in found for name in each["modules"]
    }
    assert recomputed & {"selective", "full"}
    assert "language recomputes" in ask(MODEL, *tight)[1]
    fixed = 'recompute_granularity = "none"\n' + MODEL
    code, _, complaints = ask(fixed, *tight)
    assert code == 2 and "no layout fits" in complaints


def test_an_encoder_without_images(ask):
    model = MODEL.replace("patch_size = 588", "images_per_sample = 0\nfrozen = true")
    found = json.loads(ask(model, *ASKED, "--json")[1])["proposals"]
    assert len(found) == 10
    busy = [stage["busy"] for each in found for stage in each["modules"]["vision"]["stages"]]
    assert set(busy) == {0.0}
    text = model[: model.index("[vision]")] + model[model.index("[language]") :]
    alone = json.loads(ask(text, *ASKED, "--json")[1])["proposals"][0]["step_seconds"]
    assert alone <= found[0]["step_seconds"] < 1.2 * alone  # messages without bytes take latency


def test_the_best_per_gpu_come_first_if_asked(ask):
    found = json.loads(ask(MODEL, *ASKED, "--json", "--per-gpu")[1])["proposals"]
    rates = [proposal["samples_per_second_per_allocated_gpu"] for proposal in found]
    assert rates == sorted(rates, reverse=True)
    fastest = json.loads(ask(MODEL, *ASKED, "--json")[1])["proposals"][0]
    assert rates[0] >= fastest["samples_per_second_per_allocated_gpu"]


def test_what_is_written_runs_and_costs_the_same(ask, tmp_path, capsys):
    files = ("--write", "best.toml", "--trace", "step.json", "--svg", "step.svg")
    best = json.loads(ask(MODEL, *ASKED, *files, "--json")[1])["proposals"][0]
    layout = read_layout("best.toml")
    for name, module in layout.items():
        assert module.data_parallel_size == best["modules"][name]["data_parallel_size"]
        assert module.rank_offset == best["modules"][name]["rank_offset"]
    layout_command.main(["best.toml", "--json"])
    assert json.loads(capsys.readouterr().out)["ranks"] == best["gpus"]
    again = json.loads(
        ask(MODEL, "--layout", "best.toml", "--gpus", "8", "--gpus-per-node", "4", "--json")[1]
    )
    assert again["proposals"][0]["step_seconds"] == best["step_seconds"]
    events = json.loads(Path("step.json").read_text())["traceEvents"]
    assert max(event.get("ts", 0) + event.get("dur", 0) for event in events) == pytest.approx(
        1e6 * best["step_seconds"]
    )
    assert ElementTree.parse("step.svg").getroot().tag.endswith("svg")


def test_the_written_layout_trains_on_real_ranks(ask):
    """Two layers and two heads, as the tests' own model has."""
    small = MODEL.replace("num_layers = 4", "num_layers = 2").replace("heads = 4", "heads = 2")
    asked = ("--gpus", "4", "--gpus-per-node", "2", "--global-batch-size", "8", "--json")
    found = json.loads(
        ask(small.replace("heads = 8", "heads = 2"), *asked, "--write", "best.toml")[1]
    )
    layout, best = read_layout("best.toml"), found["proposals"][0]
    case = Case(
        modules=layout,
        micro_batch_size=best["micro_batch_size"],
        num_microbatches=min(best["num_microbatches"], 3),
    )
    assert min(world(best["gpus"]).run("cases:check", case)) > 0


def test_measured_costs_replace_estimates(ask):
    options = (*ASKED, "--costs", "costs.toml", "--json", "--count", "1")
    (best,) = json.loads(ask(MODEL, *options, costs=COSTS)[1])["proposals"]
    work = 12 * (0.5 + 1.5 + 1 + 2) / 8  # of which DP 12 would leave no GPU without any
    assert work <= best["step_seconds"] < 1.4 * work


def test_what_is_measured_can_be_planned_with(ask):
    assert ask(MODEL, "--measure", "costs.toml") == (0, "", "")
    text = Path("costs.toml").read_text()
    told = tomllib.loads(text)
    assert list(told) == ["vision", "language"]
    for name, costs in told.items():
        assert costs["backward_seconds_per_sample"] == pytest.approx(
            2 * costs["forward_seconds_per_sample"], rel=1e-4
        ), name
        assert 0 < costs[REPEATED] < 1, name
    options = (*ASKED, "--costs", "costs.toml", "--json", "--count", "1")
    (best,) = json.loads(ask(MODEL, *options, costs=text)[1])["proposals"]
    work = 12 * sum(3 * costs["forward_seconds_per_sample"] for costs in told.values())
    assert best["step_seconds"] >= work / 8 * 0.99
    assert ask("sequence_parallel = true\n" + MODEL, "--measure", "shared.toml")[0] == 0
    assert REPEATED not in Path("shared.toml").read_text(), "norms are shared out too"
    sizes = read_model("model.toml")
    for module in sizes.values():  # twice the products' sizes are the operations but attention's
        counted = sum(2 * times * a * b for (a, b), times in products(module, 512).items())
        attention = module.num_layers * 4 * module.sequence * module.query_size
        attention /= 2 if module.is_language else 1
        flops = forward_flops(module, 512) / module.tokens(1)
        assert counted + attention == pytest.approx(flops)


def test_one_change_that_would_open_layouts_is_told(ask):
    odd = MODEL.replace("num_attention_heads = 8", "num_attention_heads = 5\nkv_channels = 64")
    costs = COSTS.replace("[language]", "[language]\ntensor_parallel_efficiency = 1")
    options = (
        "--gpus",
        "8",
        "--gpus-per-node",
        "4",
        "--global-batch-size",
        "2",
        "--costs",
        "costs.toml",
    )
    found = json.loads(ask(odd, *options, "--json", "--count", "1", costs=costs)[1])
    (line,) = found["openings"]
    best = found["proposals"][0]["step_seconds"]
    mended = odd.replace("num_attention_heads = 5", "num_attention_heads = 8")
    known = json.loads(ask(mended, *options, "--json", "--count", "1", costs=costs)[1])
    least = known["proposals"][0]["step_seconds"]
    assert least < 0.7 * best
    assert line == (
        f"language with num_attention_heads 8 instead of 5 could have TP 4: {least:.4g} s a step "
        f"instead of {best:.4g} s"
    )
    assert known["openings"] == []
    assert line in ask(odd, *options, "--count", "1", costs=costs)[1]


def test_a_batch_that_more_layouts_divide_is_told(ask):
    """Of 17 samples no replicas but 17 read as many each."""
    options = ("--gpus", "8", "--gpus-per-node", "4", "--costs", "costs.toml", "--json")

    def best(batch: int, *more: str) -> tuple[list[str], float]:
        asked = (*options, "--global-batch-size", str(batch), "--count", "1", *more)
        found = json.loads(ask(MODEL, *asked, costs=COSTS)[1])
        return found["openings"], found["proposals"][0]["samples_per_second"]

    (line,), before = best(17)
    openings, rate = best(16)
    assert (openings, rate > 1.05 * before) == ([], True)
    assert line == (
        f"with 16 samples a step, which 8 GPUs divide, instead of 17: {rate:.4g} samples/s instead "
        f"of {before:.4g}"
    )
    assert best(17, "--micro-batch-size", "17")[0] == [], "16 would not be a multiple"
    assert best(12)[0] == [], "16 would be another training"


def test_the_answer_says_what_a_slower_gpu_changes(ask):
    layout = "global_batch_size = 12\nmicro_batch_size = 12\n[vision]\n[language]\n"
    free = ("--node-latency", "1e-9", "--node-bandwidth", "1e9", "--memory-bandwidth", "1e9")
    options = ("--layout", "layout.toml", "--json", *free, "--flops")
    found = [
        json.loads(ask(MODEL, *options, flops, layout=layout)[1]) for flops in ("10", "8", "12")
    ]
    _, slower, faster = (each["proposals"][0]["step_seconds"] for each in found)
    assert f"takes {slower:.4g} s, and {faster:.4g} s if 20 % faster" in found[0]["assumptions"][0]


def test_an_encoder_inside_the_first_stage(ask):
    layout = "global_batch_size = 12\nmicro_batch_size = 1\n[vision]\nrank_offset = 0\n"
    layout += "[language]\nrank_offset = 0\npipeline_model_parallel_size = 2\n"
    options = ("--layout", "layout.toml", "--costs", "costs.toml", "--json")
    halves = COSTS_BY_HAND.replace("[language]", "[language]\nlayers_per_stage = [1, 1]")
    files = {"layout": layout, "costs": halves}
    (phases,) = json.loads(ask(MODEL, *options, **files)[1])["proposals"]
    inside = json.loads(ask(MODEL, *options, "--inside-first-stage", **files)[1])
    # Each microbatch keeps the first stage busy for 2 + 1.5 s, and the second for 1.5 s: the first
    # waits from 2 to 2.5 for its first gradient.
    assert inside["proposals"][0]["step_seconds"] == pytest.approx(12 * 3.5 + 0.5, rel=0.01)
    assert phases["step_seconds"] == pytest.approx(12 * 2 + 13 * 1.5, rel=0.01)
    behind = layout.replace("rank_offset = 0\n", "rank_offset = 0\ndata_parallel_size = 2\n", 1)
    behind = behind.replace("batch_size = 1\n", "batch_size = 2\n")
    code, _, complaints = ask(
        MODEL, *options[:-1], "--inside-first-stage", **{**files, "layout": behind}
    )
    assert code == 2
    assert "layout.toml:4 [vision] rank_offset: vision has ranks behind" in complaints


def test_costs_of_one_tp_are_scaled_to_another(ask):
    """Four sums of 128 KiB a layer and two of the vocabulary for each sample, over given links.

    Ranks wait for their latency once a microbatch, and each repeats a fourth of the work.
    """
    told = "measured_tensor_parallel_size = 2\nmeasured_samples = 6\n"
    told += f"{REPEATED} = 0.25"
    costs = COSTS_BY_HAND.replace("[language]", f"[language]\n{told}")
    options = ("--layout", "layout.toml", "--costs", "costs.toml", "--gpus", "8", "--json")
    links = ("--micro-batch-size", "12", "--global-batch-size", "12", "--node-bandwidth", "0.01")
    costs = costs[: costs.index("[cluster]")] + "[cluster]\nnode_latency_seconds = 0.01\n"
    hops = {tp: (4 * 4 + 2) * 2 * (tp - 1) for tp in (1, 2, 4)}

    def waited(tp: int, samples: int) -> float:
        return hops[tp] * (128 * 512 * 2 / tp / 1e7 + 0.01 / samples)

    def seconds(tp: int) -> float:
        layout = f"[vision]\n[language]\ntensor_model_parallel_size = {tp}\n"
        shown = ask(MODEL, *options, *links, layout=layout, costs=costs)[1]
        shares = json.loads(shown)["proposals"][0]
        (stage,) = shares["modules"]["language"]["stages"]
        return stage["busy"] * shares["step_seconds"] / 12

    assert 2 * waited(2, 6) < 1.5
    computed = (3 - 2 * waited(2, 6)) / (1 + 0.25)
    assert seconds(1) == pytest.approx(computed, rel=1e-3)
    for tp in (2, 4):
        shared = computed * (0.25 + 0.75 / tp)
        assert seconds(tp) == pytest.approx(shared + waited(tp, 12), rel=1e-3), tp
    costs = costs.replace("measured_samples = 6", "measured_samples = 12")
    assert seconds(2) == pytest.approx(3 / 2, rel=1e-3), "as it was measured"
    costs = costs.replace("node_latency_seconds = 0.01", "node_latency_seconds = 9")
    assert seconds(2) == pytest.approx(3 / 2, rel=1e-3), "whatever the links are said to be"
    shown = ask(MODEL, *options[:-1], *links, layout="[vision]\n[language]\n", costs=costs)[1]
    assert "language costs what costs.toml says, measured at TP 2 and CP 1: what ranks" in shown
    assert "another model" not in shown
    other = costs.replace("[language]", "[language]\ngradient_bytes = 1e12")
    shown = ask(MODEL, *options[:-1], *links, layout="[vision]\n[language]\n", costs=other)[1]
    assert "extrapolated: costs.toml has 1e+03 GB of gradients for language" in shown


def test_costs_of_shorter_samples_are_scaled_and_it_is_said(ask):
    """Twice the tokens of linear layers, and four times those of attention."""
    measured = "[language]\nmeasured_seq_length = 64\nmeasured_samples = 3"
    costs = COSTS_BY_HAND.replace("[language]", measured)
    options = ("--layout", "layout.toml", "--costs", "costs.toml", "--json")
    layout = "global_batch_size = 12\nmicro_batch_size = 12\n[vision]\n[language]\n"
    found = json.loads(ask(MODEL, *options, layout=layout, costs=costs)[1])
    (each,) = found["proposals"]
    (stage,) = each["modules"]["language"]["stages"]
    sizes = read_model("model.toml")["language"]
    flops = [forward_flops(evolve(sizes, seq_length=length), 512) for length in (64, 128)]
    assert 2 < flops[1] / flops[0] < 4
    took = stage["busy"] * each["step_seconds"]
    assert took == pytest.approx(12 * 3 * flops[1] / flops[0])
    said = "\n".join(found["assumptions"])
    assert "language was measured with 3 samples of a microbatch on a rank, layout 1 has 12" in said
    assert "language was measured with 64 tokens a sample, and has 128" in said
    same = costs.replace("= 64", "= 128").replace("samples = 3", "samples = 12")
    known = json.loads(ask(MODEL, *options, layout=layout, costs=same)[1])
    assert "extrapolated" not in "\n".join(known["assumptions"])


def test_what_stands_in_the_costs_counts_even_if_it_is_the_default(ask):
    layout = "[vision]\n[language]\ntensor_model_parallel_size = 2\n"
    costs = COSTS + "optimizer_seconds = 0\ntensor_parallel_efficiency = 1.0\n"
    costs += "[cluster]\nnode_latency_seconds = 0\n"
    frozen = MODEL.replace("[language]", "frozen = true\n[language]")
    files = ("--layout", "layout.toml", "--costs", "costs.toml", "--micro-batch-size", "12")

    def seconds(model: str, costs: str) -> float:
        shown = ask(model, *ASKED, *files, "--json", layout=layout, costs=costs)[1]
        return json.loads(shown)["proposals"][0]["step_seconds"]

    learns = costs.replace("[language]", "optimizer_seconds = 0\nfrozen = false\n[language]")
    assert seconds(frozen, learns) == pytest.approx(12 * (0.5 + 1.5 + (1 + 2) / 2), rel=1e-4)
    assert seconds(frozen, costs) == pytest.approx(12 * (0.5 + (1 + 2) / 2), rel=1e-4)
    less_efficient = costs.replace("efficiency = 1.0", "efficiency = 0.5")
    assert seconds(frozen, less_efficient) == pytest.approx(12 * (0.5 + 1 + 2), rel=1e-4)


@pytest.mark.parametrize(
    ("gpus_per_node", "link", "seconds"),
    [("1", "network", 3 + 12 * 1e9 / 2e9), ("2", "node", 5 + 12 * 1e9 / 4e9)],
)
def test_messages_take_what_the_options_say(ask, gpus_per_node, link, seconds):
    options = ("--gpus", "2", "--gpus-per-node", gpus_per_node, "--costs", "costs.toml")
    options += ("--node-latency", "5e6", "--node-bandwidth", "4", "--layout", "layout.toml")
    options += ("--network-latency", "3e6", "--network-bandwidth", "2", "--json")
    layout = "global_batch_size = 12\nmicro_batch_size = 12\n[vision]\n[language]\n"
    costs = COSTS_BY_HAND[: COSTS_BY_HAND.index("[cluster]")]
    costs = costs.replace("[vision]", "[vision]\noutput_bytes_per_sample = 1e9")
    found = json.loads(ask(MODEL, *options, layout=layout, costs=costs)[1])["proposals"]
    computing = 12 * (0.5 + 1.5 + 1 + 2)
    assert found[0]["step_seconds"] == pytest.approx(computing + 2 * seconds), link


def test_a_gpu_is_as_fast_as_the_options_say(ask):
    layout = "global_batch_size = 12\nmicro_batch_size = 12\n[vision]\n[language]\n"

    def seconds(*options: str) -> float:
        asked = ("--layout", "layout.toml", "--json", *options)
        return json.loads(ask(MODEL, *asked, layout=layout)[1])["proposals"][0]["step_seconds"]

    free = ("--node-latency", "1e-9", "--node-bandwidth", "1e9", "--memory-bandwidth", "1e9")
    one = seconds(*free, "--flops", "1")
    sizes = read_model("model.toml")
    total = sum(forward_flops(each, 512) for each in sizes.values())
    assert one == pytest.approx(12 * 3 * total / 1e12, rel=1e-6)
    slow = ("--node-latency", "1e-9", "--node-bandwidth", "1e9", "--flops", "1e9")
    number = max(layers_numel(each, range(each.num_layers), 512) for each in sizes.values())
    assert seconds(*slow, "--memory-bandwidth", "1") == pytest.approx(28 * number / 1e9, rel=1e-3)


def test_links_that_nobody_measured_are_as_assumed(ask):
    costs = COSTS + "[cluster]\nnetwork_bytes_per_second = 5e9\n"
    shown = ask(MODEL, *ASKED, "--costs", "costs.toml", costs=costs)[1]
    links = "links: 300 GB/s and 10 us inside a node of 4, 5 GB/s and 20 us between nodes"
    assert links in shown


def test_costs_of_some_stages_count_for_as_many(ask):
    """Of a PP 2 whose second stage has three fourths; any other PP has its work by sizes."""
    costs = COSTS_BY_HAND.replace("[cluster]", "layers_per_stage = [1, 3]\n[cluster]")
    options = ("--costs", "costs.toml", "--layout", "layout.toml")

    def busy(pp: int) -> list[float]:
        layout = (
            f"micro_batch_size = 12\n[vision]\n[language]\npipeline_model_parallel_size = {pp}\n"
        )
        shown = ask(MODEL, *ASKED, *options, "--json", layout=layout, costs=costs)[1]
        (found,) = json.loads(shown)["proposals"]
        stages = found["modules"]["language"]["stages"]
        return [stage["busy"] * found["step_seconds"] / 12 for stage in stages]

    assert busy(2) == pytest.approx([3 / 4, 3 * 3 / 4], rel=1e-3)
    assert busy(4)[:3] == pytest.approx(3 * [busy(4)[0]]) and busy(4)[3] > busy(4)[0]
    assert sum(busy(4)) == pytest.approx(3, rel=1e-3)
    shown = ask(MODEL, *ASKED, "--costs", "costs.toml", costs=costs)[1]
    assert "language has stages as costs.toml says where its PP is 2" in shown


def test_the_batch_may_stand_in_the_layout(ask):
    layout = "global_batch_size = 8\nmicro_batch_size = 4\n[vision]\n[language]\n"
    code, shown, _ = ask(MODEL, "--layout", "layout.toml", layout=layout)
    assert code == 0
    assert "8 GPUs, 8 a node; 8 samples a step; the layout as given" in shown
    known = json.loads(ask(MODEL, "--layout", "layout.toml", "--json", layout=layout)[1])
    assert known["proposals"][0]["num_microbatches"] == 2
    assert known["proposals"][0]["empty_gpus"] == 6


def test_what_is_closest_and_why(ask):
    code, shown, complaints = ask(MODEL, *ASKED, "--memory", "20MB", "--reserve", "1MB")
    assert (code, shown) == (2, "")
    assert "no layout fits into 8 GPUs of 0.02 GB:\n  - closest is vision TP" in complaints
    assert "together need" in complaints or "stage 0 needs" in complaints
    assert "weights" in complaints
    _, shown, _ = ask(MODEL, *ASKED, "--memory", "20MB", "--reserve", "1MB", "--json")
    found = json.loads(shown)
    assert found["proposals"] == []
    assert found["closest"]["headroom_bytes"] < 0


def test_what_is_closest_for_a_given_microbatch(ask):
    tight = ("--micro-batch-size", "1", "--memory", "20MB", "--reserve", "1MB")
    complaints = ask(MODEL, *ASKED, *tight)[2]
    assert "closest is vision" in complaints
    assert "with a microbatch of 1" in complaints


def test_as_many_gpus_as_are_said_to_do_do(ask):
    tight = ("--gpus", "4", "--gpus-per-node", "4", "--global-batch-size", "12", "--memory", "60MB")
    code, _, complaints = ask(MODEL, *tight, "--reserve", "1MB")
    assert code == 2
    (line,) = [line for line in complaints.splitlines() if "would do" in line]
    number = int(line.split()[1])
    assert ask(MODEL, "--gpus", str(number), *tight[2:], "--reserve", "1MB")[0] == 0
    assert ask(MODEL, "--gpus", str(number - 4), *tight[2:], "--reserve", "1MB")[0] == 2


def test_all_problems_are_listed_with_their_places(ask):
    model = """\
hiden_size = 3
[vision]
num_layers = 0
hidden_size = 256
num_attention_heads = 4
[language]
hidden_size = 512
num_attention_heads = "8"
"""
    layout = "micro_batch_size = 3\n[vision]\ndata_parallel_size = 2\n[language]\nfoo = 1\n"
    costs = "[audio]\nforward_seconds_per_sample = -1\n"
    files = ("--layout", "layout.toml", "--costs", "costs.toml", "--reserve", "90GB")
    code, shown, complaints = ask(model, *files, layout=layout, costs=costs)
    assert (code, shown) == (2, "")
    for part in (
        "model.toml:1 hiden_size: there is no size 'hiden_size'; did you mean hidden_size?",
        "model.toml:3 [vision] num_layers: num_layers must be a positive integer up to 10000, got 0",
        "model.toml:8 [language] num_attention_heads: num_attention_heads must be a positive integer",
        "model.toml:6 [language]: language has no num_layers",
        "layout.toml:5 [language] foo: there is no size 'foo'",
        "costs.toml:2 [audio] forward_seconds_per_sample",
        "--reserve 90 GB leaves nothing of --memory 80 GB",
    ):
        assert part in complaints
    known = json.loads(ask(model, *files, "--json", layout=layout, costs=costs)[1])
    assert known["problems"][0]["places"] == [{"module": "", "field": "hiden_size", "line": 1}]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MODEL.replace("language", "Language"), ASKED, "there is no module named 'language'"),
        ("[language\n", ASKED, "model.toml is not TOML"),
        (MODEL + "seq_length = 1\n", ASKED, "model.toml is not TOML"),
        (MODEL.replace("seq_length = 128", ""), ASKED, "model.toml:9 [language] seq_length: language has no seq_length"),
        (MODEL.replace("tokens_per_image = 64", ""), ASKED, "vision has no tokens_per_image"),
        (MODEL.replace("tokens_per_image = 64", "tokens_per_image = 64\nvocab_size = 3"), ASKED, "only the language model reads words"),
        (MODEL + "num_query_groups = 3\n", ASKED, "model.toml:15 [language] num_query_groups: language has 8 attention heads, which 3"),
        (MODEL + "moe_layer_freq = [1, 0]\n", ASKED, "language has 4 layers, but moe_layer_freq lists 2"),
        (
            MODEL + "tensor_model_parallel_size = 2\ndata_parallel_size = 2\n",
            ASKED,
            "model.toml:15 [language] tensor_model_parallel_size: language has "
            "tensor_model_parallel_size, data_parallel_size, as a layout: write it into --layout FILE",
        ),
        (MODEL + 'recompute_granularity = "full"\n', ASKED, 'write recompute_method = "uniform"'),
        (MODEL.replace("num_layers = 4", "num_layers = 4000000"), ASKED, "num_layers must be a positive integer up to 10000, got 4000000"),
        (MODEL.replace("num_layers = 4", "images_per_sample = nan\nnum_layers = 4", 1), ASKED, "images_per_sample must be a number, 0 or more, got nan"),
        (MODEL, ("--gpus", "8"), "--global-batch-size is needed"),
        (MODEL, (*ASKED, "--micro-batch-size", "5"), "global_batch_size 12 is not a multiple of micro_batch_size 5"),
        (MODEL, (*ASKED, "--memory", "80"), "must be a size such as 80GB or 80GiB, not '80'"),
        (MODEL, (*ASKED, "--flops", "0"), "must be a number above 0"),
        (MODEL, (*ASKED, "--write", "model.toml"), "--write model.toml is the model too"),
        (MODEL, (*ASKED, "--svg", "nowhere/x.svg"), "--svg nowhere/x.svg cannot be written"),
        (MODEL, (*ASKED, "--costs", "none.toml"), "none.toml cannot be read: No such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_exit_code_2(ask, model, options, message):
    code, shown, complaints = ask(model, *options)
    assert code == 2
    assert message in complaints
    assert not shown or "assumed:" in shown  # a file that cannot be written loses no table
    code, shown, complaints = ask(model, *options, "--json")
    assert (code, complaints) == (2, "")
    known = json.loads(shown)
    assert list(known) == ["proposals", "closest", "openings", "assumptions", "problems"]
    assert any(message in problem["text"] for problem in known["problems"])
    for problem in known["problems"]:
        assert list(problem) == ["message", "places", "text"]


def test_a_layout_without_room_in_memory(ask):
    layout = "micro_batch_size = 12\n[vision]\n[language]\n"
    options = (*ASKED, "--memory", "60MB", "--reserve", "1MB", "--layout", "layout.toml")
    code, shown, complaints = ask(MODEL, *options, layout=layout)
    assert code == 2
    assert "the layout as given" in shown
    assert complaints.startswith("the layout does not fit: vision stage 0 needs")
    code, shown, _ = ask(MODEL, *options, "--json", layout=layout)
    known = json.loads(shown)
    assert code == 2
    assert known["proposals"][0]["headroom_bytes"] < 0
    assert "the layout does not fit" in known["problems"][0]["text"]


def test_a_last_node_may_be_rented_in_part(ask):
    options = ("--gpus", "6", "--gpus-per-node", "4", "--global-batch-size", "12", "--json")
    found = json.loads(ask(MODEL, *options, "--count", "30")[1])["proposals"]
    allocated = {proposal["gpus"]: proposal["allocated_gpus"] for proposal in found}
    assert allocated == {gpus: 4 if gpus <= 4 else 6 for gpus in allocated}
    assert {4, 6} <= set(allocated.values())


def test_long_sequences_are_shared_by_context_parallel_ranks(ask):
    long = MODEL.replace("seq_length = 128", "seq_length = 32768")
    options = ("--gpus", "8", "--gpus-per-node", "4", "--global-batch-size", "2")
    shown = ask(long, *options)[1]
    assert (
        "TP PP DP   TP CP PP DP" in shown and "CP" not in ask(MODEL, *ASKED)[1].split("assumed")[0]
    )
    assert "as long as a rank keeps 4,096 tokens of a sample" in shown
    found = json.loads(ask(long, *options, "--json")[1])["proposals"]
    sizes = {each["modules"]["language"]["context_parallel_size"] for each in found}
    assert 1 < max(sizes) <= 8 and all(each["gpus"] <= 8 for each in found)
    assert {each["modules"]["vision"]["context_parallel_size"] for each in found} == {1}
    layout = "micro_batch_size = 1\n[vision]\n[language]\ncontext_parallel_size = {}\n"
    held = []
    for cp in (1, 4):
        asked = ("--layout", "layout.toml", "--json", *options)
        (each,) = json.loads(ask(long, *asked, layout=layout.format(cp))[1])["proposals"]
        held.append(each["modules"]["language"]["stages"][0])
    assert held[0]["activations"] == pytest.approx(4 * held[1]["activations"])
    assert held[0]["weights"] == pytest.approx(held[1]["weights"], rel=1e-3)
    assert held[0]["optimizer"] == pytest.approx(4 * held[1]["optimizer"], rel=1e-3)
    assert held[0]["messages"] == held[1]["messages"], "all get an image's tokens"
    code, _, complaints = ask(long, *options, "--layout", "layout.toml", layout=layout.format(3))
    assert code == 2
    assert (
        "layout.toml:4 [language] context_parallel_size: language has seq_length 32768"
        in complaints
    )


def test_packed_lengths_shorten_the_attention(ask):
    layout = "global_batch_size = 2\nmicro_batch_size = 2\n[vision]\n[language]\n"
    long = MODEL.replace("seq_length = 128", "seq_length = 32768")
    packed = long + f"packed_lengths = {[1024] * 32}\n"
    times = []
    for model in (long, packed):
        shown = ask(model, "--layout", "layout.toml", "--json", layout=layout)[1]
        times.append(json.loads(shown)["proposals"][0]["step_seconds"])
    attention = 3 * 4 * 2 * (32768 - 1024) * 512 * 32768 / 400e12  # halved, as it is causal
    assert times[0] - times[1] == pytest.approx(2 * attention, rel=1e-3)
    code, _, complaints = ask(packed.replace("[1024,", "[1025,"), *ASKED)
    assert code == 2
    assert "language packs 32769 tokens into rows of seq_length 32768" in complaints
    complaints = ask(packed.replace("vocab_size = 1024\n", ""), *ASKED)[2]
    assert "language has no vocab_size" in complaints and "packs" not in complaints


def test_what_encoders_do_not_share_is_an_assumption(ask):
    audio = MODEL[MODEL.index("[vision]") : MODEL.index("[language]")].replace("vision", "audio")
    line = "encoders share ranks with each other only where"
    assert line in ask(MODEL + audio, *ASKED)[1]
    assert line not in ask(MODEL, *ASKED)[1]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("[vision]\n[language]\ntensor_model_parallel_size = 3\n", "layout.toml:3 [language] tensor_model_parallel_size: language has num_attention_heads 8, which tensor_model_parallel_size 3 does not divide"),
        ("[vision]\npipeline_model_parallel_size = 3\n[language]\n", "layout.toml:2 [vision] pipeline_model_parallel_size: vision has num_layers 4"),
        ("[vision]\ndata_parallel_size = 5\n[language]\n", "layout.toml:2 [vision] data_parallel_size: global_batch_size 12 is not divisible by the DP 5"),
        ("[language]\n", "the layout has no module vision of the model: add [vision]"),
        ("[vision]\n[audio]\n[language]\n", "layout.toml:2 [audio]: the model has no module audio"),
        ("[vision]\ndata_parallel_size = 12\n[language]\n", "the layout takes 13 ranks, but --gpus is 8"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_the_model(ask, layout, message):
    options = (*ASKED, "--micro-batch-size", "12", "--layout", "layout.toml")
    code, shown, complaints = ask(MODEL, *options, layout=layout)
    assert (code, shown) == (2, "")
    assert message in complaints


def test_names_and_defaults_are_megatrons():
    worked_out = {"ffn_hidden_size", "num_query_groups", "kv_channels", "moe_ffn_hidden_size"}
    spelled = {"attention_backend", "params_dtype", "recompute_modules"}
    needed = {name for name, field in fields_dict(ModuleSizes).items() if field.default is NOTHING}
    (theirs,) = world(1).run("megatron_memory:defaults")
    compared = theirs.keys() - worked_out - spelled - needed
    assert len(compared) > 20
    for name in compared:
        assert fields_dict(ModuleSizes)[name].default == theirs[name], name


def test_the_example_is_llama_3_8b_and_clip_vit_l():
    sizes = read_model(EXAMPLES / "vlm_7b.toml")
    assert set(sizes) == {"vision", "language"}
    language, vision = (
        layers_numel(sizes[name], range(sizes[name].num_layers), 4096)
        for name in ("language", "vision")
    )
    assert language == 8_030_261_248  # as published
    layers, projection = 24 * (12 * 1024**2 + 13 * 1024), 1024 * 4096 + 4096 + 4096**2 + 4096
    embedding, norm = 588 * 1024 + 1024 + 576 * 1024, 2 * 1024
    assert vision == layers + projection + embedding + norm


def test_it_starts_without_torch(tmp_path):
    code = (
        "import sys; from megatron_mimo_coord.planning.plan_command import main; "
        f"main([{str(EXAMPLES / 'vlm_7b.toml')!r}, '--gpus', '16', '--global-batch-size', '16', '--json']); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy', 'rich')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
