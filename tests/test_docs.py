"""What the documentation says is so: its examples run, on a real rank where they need one."""

import doctest
import importlib
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import world

import megatron_mimo_coord
from megatron_mimo_coord.planning import layout_command, plan_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = Path(megatron_mimo_coord.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text().count(">>> ")
    for path in sorted(PACKAGE.glob("**/*.py"))
    if not path.stem.startswith("_")
}
WITH_EXAMPLES = [module for module, examples in MODULES.items() if examples]
WITHOUT_TORCH = ("layout.", "planning.")


def blocks(language: str) -> list[str]:
    """The code blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _doctests(module: str, make: Callable[[], dict[str, Any]], **names: Any) -> tuple[int, str]:
    """(number of examples, what went wrong) of a module's docstrings; ``make`` is called for each."""
    tested = importlib.import_module(f"megatron_mimo_coord.{module}")
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(tested, globs={**vars(tested), "Path": Path, **names}):
        if test.examples:
            test.globs |= make()
            runner.run(test, out=said.append)
    return runner.tries, "".join(said)


def _doctests_on_a_rank(modules: list[str], folder: str) -> dict[str, tuple[int, str]]:
    import torch
    from cases import Case, built
    from layouts import parallel

    from megatron_mimo_coord import MultiModuleCoordinator

    case = Case(modules={"vision": parallel(rank_offset=0), "language": parallel(rank_offset=0)})
    infra, model, _ = built(case)
    names = {"infra": infra, "model": model, "torch": torch}

    def make() -> dict[str, Any]:
        return {"coordinator": MultiModuleCoordinator(infra, model)}

    answers = {module: _doctests(module, make, folder=folder, **names) for module in modules}
    model.destroy()
    infra.destroy()
    return answers


def test_examples_in_docstrings_run(tmp_path):
    here = [module for module in WITH_EXAMPLES if module.startswith(WITHOUT_TORCH)]
    there = [module for module in WITH_EXAMPLES if module not in here]
    found = {module: _doctests(module, dict, folder=str(tmp_path)) for module in here}
    (on_a_rank,) = world(1).run(_doctests_on_a_rank, there, str(tmp_path))
    assert found | on_a_rank == {module: (MODULES[module], "") for module in WITH_EXAMPLES}


def test_every_public_name_has_an_example():
    for name in megatron_mimo_coord.__all__:
        public = getattr(megatron_mimo_coord, name)
        text = (public.__doc__ or "") + str(getattr(getattr(public, "build", None), "__doc__", ""))
        assert ">>> " in text, name


def test_the_readme_shows_what_the_commands_print_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert tomllib.loads(blocks("toml")[0]) == tomllib.loads(
        Path("examples/layout.toml").read_text()
    )
    layout, plan = (
        next(line.split()[3:] for line in README.splitlines() if line.startswith(f"uv run {name} "))
        for name in ("mimo-layout", "mimo-plan")
    )
    drawings = [tmp_path / "layout.svg", tmp_path / "plan.svg"]
    drawn = plan.index("--svg") + 1
    named, plan[drawn] = plan[drawn], str(drawings[1])
    for main, words, shown in (
        (layout_command.main, [*layout, "--svg", str(drawings[0])], blocks("text")[0]),
        (plan_command.main, plan, blocks("text")[1]),
    ):
        main(words)
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert shown.strip() in "\n".join(printed)
    for drawing, path in zip(drawings, (".github/layout.svg", named), strict=True):
        assert drawing.read_text() == Path(path).read_text(), f"draw {path} again"
        assert f"]({path})" in README


def _run_readme(code: list[str], folder: str) -> dict[str, float]:
    """Run the README's Python as one trainer."""
    import os
    from unittest.mock import patch

    import torch

    from megatron_mimo_coord.world import process_group

    def microbatch(generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        counts = [int(torch.randint(3, (), generator=generator)) for _ in range(8)]
        tokens = torch.randint(1, 16, (8, 6), generator=generator)
        for row, count in zip(tokens, counts, strict=True):
            row[:count] = 0
        return tokens, [torch.randn((count, 5), generator=generator) for count in counts]

    os.chdir(folder)
    generator = torch.Generator().manual_seed(1)
    names = {"vocab_size": 16, "image_token": 0, "num_pixels": 5, "seq_length": 6, "steps": 2}
    names |= {"num_microbatches": 2, "micro_batch_size": 8}
    names |= {
        kind: iter([microbatch(generator) for _ in range(4)])
        for kind in ("batches", "held_out_batches")
    }
    join, *trainer = code
    local = {"LOCAL_WORLD_SIZE": "12", "LOCAL_RANK": "0"}
    with (
        patch.dict(os.environ, local),
        patch.object(process_group, "init_process_group"),  # the world is there already
    ):
        exec(join, names)
    for part in trainer:
        exec(part, names)
    infra = names["infra"]
    assert all(float(norm) > 0 for norm in names["norms"].values())
    infra.destroy()
    return {"loss": names["metrics"]["loss"], "held out": names["held_out"]["loss"]}


def test_the_readme_trains(tmp_path):
    (tmp_path / "layout.toml").write_text(blocks("toml")[0])
    code = blocks("python")
    first, *others = world(12).run("test_docs:_run_readme", code, str(tmp_path))
    guessed = math.log(16)  # by a model that knows nothing of its 16 tokens yet
    assert first == {name: pytest.approx(guessed, rel=0.1) for name in ("loss", "held out")}
    assert all(metrics == first for metrics in others)
