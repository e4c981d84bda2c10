"""A folder holds whole checkpoints, whoever is killed when; no rank is needed for that."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_folder import checkpoint_path, read_manifest


def make(folder: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    path = folders.begin(folder, step, attempt=step)
    (path / "tensors").write_bytes(bytes(range(100)))
    files = {"tensors": folders.describe_file(path / "tensors")}
    return folders.finish(path, {"step": step, "files": files}, keep)


def damages(path: Path, *share: int) -> list[str]:
    return folders.damages(path, read_manifest(path)["files"], *share)


def names(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("call", range(8))
def test_a_kill_between_any_two_calls_leaves_only_whole_checkpoints(tmp_path, monkeypatch, call):
    for step in (5, 10):
        make(tmp_path, step)
    calls = 0
    order = []

    def killed_instead(owner, name):
        original = getattr(owner, name)

        def counting(*arguments, **options):
            nonlocal calls
            if calls == call:
                raise KeyboardInterrupt
            calls += 1
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    killed_instead(Path, "rename")
    killed_instead(folders.shutil, "rmtree")
    killed_instead(os, "fsync")
    with suppress(KeyboardInterrupt):
        make(tmp_path, 15)
    monkeypatch.undo()
    # on disk before it has its name: manifest, its name, the folder; then the whole one's name
    whole = ["fsync", "rename", "fsync", "rename", "fsync", "rename", "rmtree"]
    assert order == whole[:call]
    steps = folders.checkpoint_steps(tmp_path)
    assert steps[-1] == (15 if call > 3 else 10)
    assert len(steps) >= 2
    for step in steps:
        assert not damages(checkpoint_path(tmp_path, step))
    make(tmp_path, 20)
    kept = "step-00000015" if call > 3 else "step-00000010"
    assert names(tmp_path) == [kept, "step-00000020"]


def test_the_newest_are_kept(tmp_path):
    assert folders.checkpoint_steps(tmp_path / "nowhere") == []
    for step in (5, 10, 15):
        path = make(tmp_path, step)
    assert path == checkpoint_path(tmp_path, 15)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    make(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020"]
    folders.begin(tmp_path, 25, attempt=10)
    folders.begin(tmp_path, 25, attempt=11)  # what the attempt before left behind is gone
    assert names(tmp_path) == ["step-00000020", "step-00000025.b.unfinished"]
    assert folders.checkpoint_steps(tmp_path) == [20]
    assert folders.foreign_files(tmp_path) == []
    make(tmp_path, 123_456_789)
    assert folders.checkpoint_steps(tmp_path) == [20, 123_456_789]


def test_a_folder_without_our_checkpoints_is_foreign_if_it_has_anything(tmp_path):
    assert folders.foreign_files(tmp_path / "nowhere") == folders.foreign_files(tmp_path) == []
    (tmp_path / "step-30").mkdir()  # as others name them
    assert folders.checkpoint_steps(tmp_path) == []
    assert folders.foreign_files(tmp_path) == ["step-30"]
    folders.begin(tmp_path, 25, attempt=10)  # killed before its first checkpoint was whole
    assert folders.foreign_files(tmp_path) == []


def test_damage_is_found(tmp_path):
    path = make(tmp_path, 5)
    assert read_manifest(path)["step"] == 5
    assert damages(path) == damages(path, 0, 2) == []
    (path / "tensors").write_bytes(bytes(100))
    assert "its bytes are not those" in damages(path)[0]
    assert damages(path, 1, 2) == [], "another rank's share"
    (path / "tensors").write_bytes(bytes(99))
    assert "has 99 bytes, not 100" in damages(path)[0]
    (path / "tensors").unlink()
    assert "is missing" in damages(path)[0]
    document = json.loads((path / "checkpoint.json").read_text())
    document["content"]["step"] = 6
    (path / "checkpoint.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is not as it was written"):
        read_manifest(path)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(path)


def test_a_folder_has_one_training_at_a_time(tmp_path):
    claim = (
        "import sys; from pathlib import Path; "
        "from megatron_mimo_coord.training.checkpoint_folder import claim; "
        "print(claim(Path(sys.argv[1])), 'torch' in sys.modules, flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", claim, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "True False\n"
        assert not folders.claim(tmp_path)
    finally:
        first.kill()
        first.wait(60)
    assert folders.claim(tmp_path)
    assert folders.claim(tmp_path), "it is this process's already"
