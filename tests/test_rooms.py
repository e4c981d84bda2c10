"""Which room may import which: arrows run one way, and pure arithmetic knows no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import megatron_mimo_coord

PACKAGE = Path(megatron_mimo_coord.__file__).parent
NAME = "megatron_mimo_coord"
# What each room may import of this package, besides itself. Siblings may not form a circle either.
SIBLINGS = {"checks", "gradients", "bridges", "training", "metrics"}
BELOW = {
    "layout": set(),
    "planning": {"layout"},
    "world": {"layout"},
    "megatron": {"layout", "world"},
    "infra": {"layout", "world", "megatron"},
    **dict.fromkeys(SIBLINGS, {"layout", "world", "megatron", "infra"} | SIBLINGS),
    "metrics": {"layout", "planning", "world", "megatron", "infra"}
    | SIBLINGS,  # a measured step is a planned one
    "coordinator": {"layout", "world", "megatron", "infra"} | SIBLINGS,
    "megatron_bridge": {"megatron", "coordinator"},
    "cpu": {"layout", "world", "megatron", "infra"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    dotted(path): imports(path)
    for path in PACKAGE.glob("**/*.py")
    if path.name != "__main__.py" and path.parent / "__init__.py" != PACKAGE / path.name
}
FILES.pop(NAME, None)


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_is_known():
    assert {room(name) for name in FILES} <= set(BELOW)


@pytest.mark.parametrize("name", sorted(BELOW))
def test_arrows_run_one_way(name):
    for file, imported in FILES.items():
        if room(file) == name:
            rooms = {room(each) for each in imported if each.startswith(f"{NAME}.")}
            rooms.discard("__version__")
            assert rooms <= BELOW[name] | {name}, f"{file} imports {rooms - BELOW[name]}"


def test_no_circle_between_files():
    graph = {
        file: {each for each in imported if each in FILES and each != file}
        for file, imported in FILES.items()
    }
    for file in graph:  # a room's list of names is made of its files, which do not import it
        graph[file] -= {file.rpartition(".")[0]}
    TopologicalSorter(graph).prepare()


def test_no_circle_between_rooms():
    graph: dict[str, set[str]] = {name: set() for name in BELOW}
    for file, imported in FILES.items():
        graph[room(file)] |= {room(each) for each in imported if each in FILES} - {room(file)}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", ["layout", "planning"])
def test_arithmetic_runs_without_torch(name):
    files = sorted(file for file in FILES if room(file) == name)
    code = f"import sys, {', '.join(files)}; print({{'torch', 'megatron', 'numpy'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")
