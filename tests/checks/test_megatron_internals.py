"""The table of Megatron's internals is complete, true, and told to the user where it is not."""

import ast
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import megatron.core as megatron_core
import pytest
import torch
from cases import Case, built
from layouts import FAN_IN, MANY_BUCKETS, SHARDED, parallel
from ranks import world

import megatron_mimo_coord
from megatron_mimo_coord import MultiModuleCoordinator
from megatron_mimo_coord.checks.megatron_internals import INTERNALS, _resolve

PACKAGE = Path(megatron_mimo_coord.__file__).parent


# -- the table and Megatron ------------------------------------------------------------------------


def _missing(case: Case) -> list[str]:
    infra, model, coordinator = built(case)
    ddps = [ddp for ddp, _ in coordinator.module_to_grid_tuples]
    sentences = [each.sentence(found) for each in INTERNALS if (found := each.missing(ddps))]
    model.destroy()
    infra.destroy()
    return sentences


@pytest.mark.parametrize("ddp", [{}, {**MANY_BUCKETS, **SHARDED}], ids=["whole", "sharded"])
def test_the_installed_megatron_has_everything(ddp):
    experts = {"vision": parallel(), "language": parallel(dp=2, expert_model_parallel_size=2)}
    assert world(3).run(_missing, Case(modules=experts, experts=4, ddp=ddp)) == [[]] * 3


def _renamed(owner: Any, name: str) -> Iterator[Any]:
    """Take a name from a class, wherever it is inherited from, or from a module; yields restores."""
    for each in getattr(owner, "__mro__", (owner,)):
        if name in vars(each):
            kept = vars(each)[name]
            delattr(each, name)
            yield lambda each=each, kept=kept: setattr(each, name, kept)
        for method in vars(each).values() if isinstance(each, type) else ():
            if isinstance(method, FunctionType) and name in method.__code__.co_names:
                code = method.__code__
                names = tuple("renamed" if each == name else each for each in code.co_names)
                method.__code__ = code.replace(co_names=names)
                yield lambda method=method, code=code: setattr(method, "__code__", code)


def _taken(internal: Any, name: str, ddps: list[Any]) -> Iterator[Any]:
    parts = [part for ddp in ddps for part in (internal.found_on or (lambda _: ()))(ddp)]
    carriers = [part for part in parts if name in vars(part)]
    for part in carriers:
        kept = vars(part).pop(name)
        yield lambda part=part, kept=kept: vars(part).update({name: kept})
    if not carriers:
        yield from _renamed(_resolve(internal.owner), name)


@contextmanager
def _without(internal: Any, name: str, ddps: list[Any]) -> Iterator[None]:
    """As if Megatron had renamed an attribute."""
    restore = list(_taken(internal, name, ddps))
    assert restore, f"{internal.owner} has no {name} to take away"
    try:
        yield
    finally:
        for each in restore:
            each()


def _error(infra: Any, model: Any) -> str:
    try:
        MultiModuleCoordinator(infra, model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _told() -> dict[tuple[int, str], str]:
    """What a coordinator says when one name is gone, for every name of the table."""
    logging.disable(logging.CRITICAL)
    modules = {"vision": parallel(rank_offset=0), "language": parallel(rank_offset=0)}
    infra, model, coordinator = built(Case(modules=modules, ddp={**MANY_BUCKETS, **SHARDED}))
    ddps = [ddp for ddp, _ in coordinator.module_to_grid_tuples]
    told = {}
    for index, internal in enumerate(INTERNALS):
        for name in internal.plain_names:
            with _without(internal, name, ddps):
                told[index, name] = _error(infra, model)
    path = _resolve("megatron.core.optimizer.grad_scaler").__name__
    module = sys.modules[path]
    sys.modules[path] = None  # type: ignore[assignment]  # Python: importing it fails
    told[-1, path] = _error(infra, model)
    sys.modules[path] = module
    told[-1, "nothing"] = _error(infra, model)
    model.destroy()
    infra.destroy()
    logging.disable(logging.NOTSET)
    return told


@cache
def _answers() -> dict[tuple[int, str], str]:
    return world(1).run(_told)[0]


@pytest.mark.parametrize(
    ("index", "name"),
    [(index, name) for index, each in enumerate(INTERNALS) for name in each.plain_names],
    ids=lambda value: value if isinstance(value, str) else INTERNALS[value].used_by[:-3],
)
def test_a_name_that_is_gone_is_told_with_what_it_affects(index, name):
    internal, answer = INTERNALS[index], _answers()[index, name]
    if internal.fallback:
        assert answer == "none"
        return
    assert answer.startswith("ValueError: "), answer
    assert re.search(rf"{re.escape(internal.owner)} has no [\w, ]*\b{name}\b", answer)
    assert f"megatron_mimo_coord/{internal.used_by} relies on for {internal.affects}" in answer


def test_what_a_base_class_only_asks_for_is_missing(monkeypatch):
    (row,) = [each for each in INTERNALS if "DynamicGradScaler" in each.owner]
    monkeypatch.delattr(_resolve(row.owner), "update")
    assert row.missing() == ["update"]


def test_a_parameter_that_is_gone_is_missing(monkeypatch):
    row = next(each for each in INTERNALS if "start_grad_sync(force_all_reduce)" in each.names)
    monkeypatch.setattr(_resolve(row.owner), "start_grad_sync", lambda self: None)
    assert row.missing() == ["start_grad_sync(force_all_reduce)"]


def test_a_file_that_is_gone_is_told_and_all_is_well_afterwards():
    answers = _answers()
    owner = "megatron.core.optimizer.grad_scaler.DynamicGradScaler"
    assert f"{owner} has no update" in answers[-1, "megatron.core.optimizer.grad_scaler"]
    assert answers[-1, "nothing"] == "none"


def _build_without(path: str, name: str) -> None:
    """Build a coordinator as if Megatron had lost a name."""
    internal = next(each for each in INTERNALS if each.owner == path and name in each.names)
    with _without(internal, name, []):
        infra, model, _ = built(Case(modules=FAN_IN))
    model.destroy()
    infra.destroy()


def test_a_name_that_is_gone_is_told_on_every_rank():
    gone = next(each for each in INTERNALS if "_empty_encoder_output" in each.names)
    answers, errors = world(3).try_run(_build_without, gone.owner, "_empty_encoder_output")
    assert not answers
    for kind, text in errors.values():
        assert kind == "ValueError"
        assert f"{gone.owner} has no _empty_encoder_output" in text


# -- the table and this package --------------------------------------------------------------------

TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in PACKAGE.glob("**/*.py")
    if path.name != "megatron_internals.py"
}
TABLE = {(each.used_by, name) for each in INTERNALS for name in each.plain_names}

# Names that need no row in each file that uses them, and why.
PUBLIC = {
    "what a trainer builds its model, its optimizer and its schedule of": """
        DistributedDataParallel DistributedDataParallelConfig MimoModel HyperCommGrid
        ProcessGroupCollection MultiModuleProcessGroupCollection ModelParallelConfig OptimizerConfig
        TransformerConfig MegatronOptimizer MimoOptimizer ModuleOptimizerInfo DistributedOptimizer
        get_megatron_optimizer
        finalize_model_grads MultiModulePipelineCommunicator BridgeCommunicator
        ColocatedBridgeCommunicator get_cuda_rng_tracker model_parallel_cuda_manual_seed
        unwrap_model parallel_state __version__""",
    "the layers that models are made of": """
        ColumnParallelLinear RowParallelLinear DotProductAttention param_is_not_shared
        param_is_not_tensor_parallel_duplicate""",
    "Megatron's own checkpoints": """
        CheckpointingConfig save_config dict_list_map_outplace merge nested_values ShardedObject
        ShardedTensor ShardedTensorFactory apply_factory_merges is_main_replica load_preprocess""",
    "modules of Megatron's that CPU ranks patch; the table has the names in them": """
        random token_dispatcher param_and_grad_buffer CudaRNGStatesTracker""",
    "what a MimoModel is made of, and documented methods": """
        language_model modality_submodules sharded_state_dict is_current_rank_in_grid""",
    "constructor arguments that each of Megatron's classes keeps, checked for checks/modules.py": """
        config ddp_config""",
    "what every optimizer of PyTorch's has": "param_groups state step",
    "a bound of a range of Python's": "start end",
}
PUBLIC_NAMES = {name for names in PUBLIC.values() for name in names.split()}


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda each: f"{each.owner.split('.')[-1]}")
def test_each_file_of_the_table_uses_what_it_says(internal):
    tree = TREES[internal.used_by]
    used = (
        _used(tree) | _defined(tree) | {n.name for n in ast.walk(tree) if isinstance(n, ast.alias)}
    )
    unused = [name for name in internal.plain_names if name not in used]
    assert not unused, f"{internal.used_by} has no {unused}: remove them from the table"


def _defined(tree: ast.AST) -> set[str]:
    """What objects of a file's own classes have: methods, fields, what ``self`` gets."""
    found = set()
    for of_class in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in of_class.body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {each.id for each in targets if isinstance(each, ast.Name)}
        for node in ast.walk(of_class):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if _is_self(node) else set()
    return found


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _imports(tree: ast.AST) -> set[str]:
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.")
        for alias in node.names
    }


def _used(tree: ast.AST) -> set[str]:
    """Attributes that a file reads, sets or names: of objects other than those of its own classes.

    What is an attribute of ``self`` counts in a class that is derived from one of Megatron's.
    """
    found, own = set(), set()
    imported = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if not bases & imported:
                own |= {id(each) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (_is_self(node) and id(node) in own):
            found.add(node.attr)
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                arguments = node.args[1:2]
        elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            arguments = node.value.elts[1:2]  # what is to be replaced
        found |= {each.value for each in arguments if isinstance(each, ast.Constant)}
    return {name for name in found if isinstance(name, str) and not name.startswith("__")}


def _names_of(path: str) -> set[str]:
    """What a class or module of the table has; what a class sets, also on tensors, by its source."""
    owner = _resolve(path)
    if inspect.ismodule(owner):
        # Without what comes from Python's own library.
        made_by = {
            name: getattr(value, "__module__", path)
            for name, value in vars(owner).items()
            if not inspect.ismodule(value)
        }
        return {n for n, of in made_by.items() if str(of).startswith(("megatron.", "torch."))}
    found = set()
    for each in (each for each in owner.__mro__ if each.__module__.startswith("megatron.")):
        found |= set(vars(each)) | set(vars(each).get("__annotations__", {}))
        for node in ast.walk(ast.parse(inspect.getsource(each))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


@cache
def _known() -> tuple[set[str], set[str]]:
    """Names of the table's owners and private ones of all Megatron; names of many owners."""
    megatron = set().union(*(_names_of(owner) for owner in {e.owner for e in INTERNALS}))
    core = Path(megatron_core.__file__).parent
    for path in core.glob("**/*.py"):
        megatron |= set(re.findall(r"\b_[a-zA-Z]\w*", path.read_text()))
    ours = set().union(*map(_defined, TREES.values()))
    others = (torch, torch.Tensor, torch.nn.Module, torch.distributed, torch._C, dict, list, slice)
    others += (torch.distributed.distributed_c10d, torch.distributed.ProcessGroup, torch.cuda)
    return megatron, ours | PUBLIC_NAMES | {name for each in others for name in dir(each)}


@pytest.mark.parametrize("file", sorted(TREES))
def test_no_file_uses_what_is_not_in_the_table(file):
    """A name that this package's own classes or PyTorch's have as well is left out.

    Nothing in the source tells whose it is: ``buffers``, ``prepare_grads``, ``start_grad_sync``.
    """
    megatron, ambiguous = _known()
    used = (_used(TREES[file]) & megatron) - ambiguous
    used |= _imports(TREES[file]) - PUBLIC_NAMES
    unlisted = sorted(name for name in used if (file, name) not in TABLE)
    assert not unlisted, f"{file} relies on {unlisted}: add a row to megatron_internals.INTERNALS"


def test_the_package_imports_without_the_names_of_the_table():
    names = {name for _, name in TABLE}
    for file, tree in TREES.items():
        late = {
            id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)
        }
        early = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in late
            for alias in node.names
            if not (node.module or "").startswith("megatron_mimo_coord")
        }
        assert not early & names, f"{file} imports {early & names} at its top"


def test_no_exception_is_left_over():
    used = set().union(*map(_used, TREES.values()), *map(_imports, TREES.values()))
    assert used >= PUBLIC_NAMES, PUBLIC_NAMES - used
