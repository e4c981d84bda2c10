"""What Megatron-Core does not promise is named in ``megatron/`` alone, is there, and is told if not.

What is named is read from the source: no table repeats it.
"""

import ast
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import megatron.core as megatron_core
import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from cases import Case, _data, built, optimizer_of, run_schedule
from layouts import FAN_IN, MANY_BUCKETS, SHARDED, parallel
from ranks import world

import megatron_mimo_coord

PACKAGE = Path(megatron_mimo_coord.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in PACKAGE.glob("**/*.py")
}
ROOM = {file: tree for file, tree in TREES.items() if file.startswith("megatron/")}
OTHERS = {file: tree for file, tree in TREES.items() if file not in ROOM}

# What a trainer itself builds its model, its optimizer and its schedule of, and what these carry.
TEXT = """
    DistributedDataParallel DistributedDataParallelConfig MimoModel HyperCommGrid
    ProcessGroupCollection MultiModuleProcessGroupCollection ModelParallelConfig
    OptimizerConfig TransformerConfig MegatronOptimizer MimoOptimizer finalize_model_grads
    MultiModulePipelineCommunicator __version__ config ddp_config no_sync zero_grad_buffer
    language_model modality_submodules module sharded_state_dict scale_loss step no_sync_func
    finalize_model_grads_func grad_scale_func grad_sync_func param_sync_func
    calculate_per_token_loss variable_seq_lengths use_distributed_optimizer
    overlap_param_gather overlap_grad_reduce align_param_gather special_token_ids
    num_distributed_optimizer_instances timers sequence_parallel rank_offset size tp cp dp pp dp_cp
    ep expt_tp parallel_state get_model_config ParamKey ParamGroupOverride
"""
PROMISED = set(TEXT.split())


def _imported(tree: ast.AST) -> set[str]:
    """Names that a file imports from Megatron-Core."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.")
        for alias in node.names
    }


def _used(tree: ast.AST) -> set[str]:
    """Attributes that a file reads or sets, not of ``self``, also where it gives their names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if is_self else {node.attr}
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("getattr", "hasattr", "setattr", "delattr", "set"):
                arguments = node.args[1:2]
        elif isinstance(node, ast.Tuple):
            arguments = node.elts[1:2]  # (owner, name)
        found |= {str(each.value) for each in arguments if isinstance(each, ast.Constant)}
    return {name for name in found if name.isidentifier() and not name.startswith("__")} - {"None"}


def _defined(tree: ast.AST) -> set[str]:
    """What a file gives names to: functions, classes, fields, arguments, what ``self`` gets."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= {node.attr} if is_self else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@cache
def _of_megatron() -> set[str]:
    """Names of attributes, methods, fields, functions and variables of all Megatron-Core."""
    found = set()
    setting = re.compile(
        r"\bdef (\w+)|\bclass (\w+)|\.(\w+)\s*(?:=[^=]|:[^=]+=)|^\s*(\w+)\s*(?::|=[^=])", re.M
    )
    several = re.compile(r"self\.(\w+),")
    for path in Path(megatron_core.__file__).parent.glob("**/*.py"):
        text = path.read_text()
        found |= {name for names in setting.findall(text) for name in names if name}
        found |= set(several.findall(text))
    return found


# Attributes of Python's and PyTorch's objects, and what no class below lists.
OF_THE_LIBRARIES = {
    *("tb_frame", "tb_next", "f_globals", "f_code", "co_name", "obj", "func", "inf", "nbytes"),
    *("Module", "training", "info"),
}
OF_PYTORCH = (
    *(
        torch,
        torch.optim,
        torch.Tensor,
        torch.nn.Module,
        torch.nn.Parameter,
        torch.distributed,
        c10d,
    ),
    *(torch.distributed.ProcessGroup, torch.distributed.Work, torch.UntypedStorage, torch.cuda),
    *(dict, list, slice, str, type, torch.Generator, torch.linalg, Fraction, logging, ExitStack),
)


@cache
def _ambiguous() -> set[str]:
    """Names that this package's own classes or PyTorch's have as well."""
    ours = set().union(*map(_defined, TREES.values()))
    return ours | OF_THE_LIBRARIES | {name for owner in OF_PYTORCH for name in dir(owner)}


@cache
def _insides() -> set[str]:
    """What ``megatron/`` names of Megatron-Core without a promise."""
    named = set().union(*(_used(tree) | _imported(tree) for tree in ROOM.values()))
    return (named & _of_megatron()) - PROMISED - _ambiguous()


def test_the_room_has_names():
    assert {"bucket_groups", "grad_reduce_handle", "per_param_grad_ready_counts"} <= _insides()
    assert {"_set_global_memory_buffer", "get_grads_for_grad_norm", "module_infos"} <= _insides()


@pytest.mark.parametrize("file", sorted(OTHERS))
def test_no_other_room_names_the_insides(file):
    """Nothing in a source says whose a name is that this package or PyTorch has as well."""
    private = {name for name in _of_megatron() if name.startswith("_")}
    named = _used(OTHERS[file]) & (_insides() | private) - _ambiguous()
    named |= _imported(OTHERS[file]) - PROMISED
    assert not named, f"{file} names {sorted(named)}: that belongs behind a facade of megatron/"


@pytest.mark.parametrize("file", sorted(ROOM))
def test_every_name_is_there(file):
    """What a file of the room names is Megatron-Core's, this package's or PyTorch's."""
    attributes = {
        node.attr for node in ast.walk(ROOM[file]) if isinstance(node, ast.Attribute)
    } | _imported(ROOM[file])
    attributes = {name for name in attributes if not name.startswith("__")}
    gone = attributes - _of_megatron() - _ambiguous() - PROMISED
    assert not gone, f"megatron-core {megatron_core.__version__} has no {sorted(gone)}"


# -- who changes what ------------------------------------------------------------------------------

OF_OTHERS = {
    "model",
    "ddp",
    "config",
    "settings",
    "optimizer",
    "scaler",
    "bucket",
    "group",
    "buffer",
}
WATCH = {"register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"}
BELOW_THE_COORDINATOR = (
    "coordinator",
    "checks/",
    "gradients/",
    "bridges/",
    "training/",
    "metrics/",
)


@pytest.mark.parametrize("file", [f for f in sorted(OTHERS) if f.startswith(BELOW_THE_COORDINATOR)])
def test_what_is_changed_in_the_objects_of_others_is_recorded(file):
    undone = {
        id(inner)
        for node in ast.walk(OTHERS[file])
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "on_close"
        for inner in ast.walk(node)
    }
    for node in ast.walk(OTHERS[file]):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in WATCH:
            assert id(node) in undone, f"{file}:{node.lineno}: {ast.unparse(node)} stays"
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            assert name.strip("_") not in OF_OTHERS, f"{file}:{node.lineno}: {ast.unparse(node)}"


# -- a name that is gone ---------------------------------------------------------------------------


@contextmanager
def _renamed(owner: Any, name: str) -> Iterator[None]:
    """As if Megatron had renamed an attribute, wherever its class sets it."""
    restore = []
    for each in getattr(owner, "__mro__", (owner,)):
        if name in vars(each):
            kept = vars(each)[name]
            delattr(each, name)
            restore.append(lambda each=each, kept=kept: setattr(each, name, kept))
        for method in vars(each).values() if isinstance(each, type) else ():
            if isinstance(method, FunctionType) and name in method.__code__.co_names:
                code = method.__code__
                names = tuple("renamed" if each == name else each for each in code.co_names)
                method.__code__ = code.replace(co_names=names)
                restore.append(lambda method=method, code=code: setattr(method, "__code__", code))
    assert restore, f"{owner} has no {name} to take away"
    try:
        yield
    finally:
        for undo in restore:
            undo()


GONE = [
    ("distributed.distributed_data_parallel", "DistributedDataParallel", "params_with_grad"),
    ("distributed.param_and_grad_buffer", "_ParamAndGradBucket", "gradient_scaling_factor"),
    ("distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup", "grad_reduce_handle"),
    ("distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup", "is_first_batch"),
    ("models.mimo.optimizer", "MimoOptimizer", "module_infos"),
    ("parallel_state", "", "_GLOBAL_MEMORY_BUFFER"),
]


def _said(case: Case, module: str, owner: str, name: str) -> str:
    """What a step says without a name."""
    from importlib import import_module

    found = import_module(f"megatron.core.{module}")
    with _renamed(getattr(found, owner) if owner else found, name):
        try:
            _, model, coordinator = built(case)
            optimizer = optimizer_of(case, coordinator)
            coordinator.attach(model.config, optimizer)
            communicator = coordinator.build_pipeline_communicator(model.config)
            coordinator.zero_grad_buffer()
            run_schedule(case, model, coordinator, communicator, _data(case, 0))
            optimizer.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("module", "owner", "name"), GONE, ids=[name for *_, name in GONE])
def test_a_name_that_is_gone_is_told_by_the_file_that_needs_it(module, owner, name):
    case = Case(
        modules={"vision": parallel(rank_offset=0), "language": parallel(rank_offset=0)},
        ddp={**MANY_BUCKETS, **SHARDED},
    )
    fresh = world(1)
    (said,) = fresh.run("test_names:_said", case, module, owner, name)
    version = re.escape(megatron_core.__version__)
    whose = re.escape(f"megatron.core.{module}" + (f".{owner}" if owner else ""))
    assert re.fullmatch(
        rf"RuntimeError: megatron-core {version}: {whose} has no {name}, on which "
        rf"megatron_mimo_coord/megatron/\w+\.py relies \(.+\); use megatron-core 0\.19, or the "
        rf"release of this package for it",
        said,
    ), said


def _build_without(module: str, owner: str, name: str) -> None:
    raise RuntimeError(_said(Case(modules=FAN_IN), module, owner, name))


def test_a_name_that_is_gone_is_told_on_every_rank():
    answers, errors = world(3).try_run("test_names:_build_without", *GONE[1])
    assert not answers
    for _, text in errors.values():
        assert "has no gradient_scaling_factor" in text
