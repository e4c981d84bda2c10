"""What one GPU can show, and two: NCCL with a rank on each, which both modules share.

uv run pytest -m gpu
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from cases import Case
from layouts import OVERLAP, PER_TOKEN, SHARDED, VARYING, parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU here: NCCL, streams and CUDA graphs need one (tests/cpu rehearses NCCL's rules)",
    ),
]
MODULES = {"vision": parallel(rank_offset=0), "language": parallel(rank_offset=0)}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits_vlm.py"
DDPS = {"plain": {}, "overlap": OVERLAP, "sharded": {**OVERLAP, **SHARDED}}


@pytest.fixture(scope="module")
def _nccl() -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("ddp", DDPS.values(), ids=DDPS)
def test_gradients_are_the_oracles(ddp):
    case = Case(modules=MODULES, images=VARYING, steps=2, per_token=PER_TOKEN, ddp=ddp)
    # A GPU adds up an embedding's gradient in any order.
    assert cases.check(case, tolerance=1e-4) > 0


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("ddp", DDPS.values(), ids=DDPS)
def test_only_the_forward_of_megatrons_mimo_model_waits_for_the_device(ddp):
    """It counts image tokens on the host; sync-debug mode "error" would stop there."""
    case = Case(modules=MODULES, steps=1, per_token=PER_TOKEN, ddp=ddp, no_optimizer=True)
    infra, model, coordinator = cases.built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)
    finalize = model.config.finalize_model_grads_func

    def finalize_without_waiting(*args: Any, **options: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        finalize(*args, **options)
        torch.cuda.set_sync_debug_mode("warn")

    for is_warm in (False, True):
        coordinator.zero_grad_buffer()
        data = cases._data(case, 0)  # copies to the device wait
        if is_warm:
            model.config.finalize_model_grads_func = finalize_without_waiting
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                losses = cases.run_schedule(case, model, coordinator, communicator, data)
                metrics = coordinator.reduce_losses(losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert metrics["loss"] > 0
    waits = {each.filename for each in caught if "synchroniz" in str(each.message)}
    assert {Path(name).parts[-3:] for name in waits} <= {("mimo", "model", "base.py")}
    model.destroy()
    infra.destroy()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["plain", "sharded"])
def test_a_cuda_graph_holds_the_finalize(ddp):
    infra, model, coordinator = cases.built(Case(modules=MODULES, per_token=PER_TOKEN, ddp=ddp))
    tokens = torch.full((), 5, dtype=torch.int, device="cuda")
    grads = [
        buffer.grad_data
        for module, _ in coordinator.module_to_grid_tuples
        for buffer in module.buffers
    ]

    def prepare() -> None:
        coordinator.zero_grad_buffer()
        for grad in grads:
            grad.fill_(2.0)

    prepare()
    coordinator.finalize_model_grads([model], tokens)
    expected = [grad.clone() for grad in grads]
    prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread queries events meanwhile, which the default mode forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        coordinator.finalize_model_grads([model], tokens)
    for _ in range(2):
        for grad in grads:
            grad.fill_(2.0)
        graph.replay()
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted)
    model.destroy()
    infra.destroy()


class TransformerEngineCase(Case):
    """Whose language model has the attention that GPUs have."""

    def shape(self) -> Any:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        shape = super().shape()
        return evolve(shape, language=evolve(shape.language, attention=TEDotProductAttention))


def _with_transformer_engine(context_parallel_size: int, packed: bool) -> TransformerEngineCase:
    """Flash attention takes bf16 alone; the oracle has the same, unpacked and on one rank."""
    pytest.importorskip("transformer_engine_torch")
    size = context_parallel_size
    language = parallel(context_parallel_size=size, rank_offset=0)
    return TransformerEngineCase(
        modules={"vision": parallel(dp=size, rank_offset=0), "language": language},
        images=VARYING,
        per_token=PER_TOKEN,
        wrap="submodules",
        packed=packed,
        lengths=(6, 2, 1, 4),
    )


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_transformer_engines_attention(packed):
    assert cases.check(_with_transformer_engine(1, packed), tolerance=0.05) > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="context parallelism takes two GPUs")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_transformer_engines_attention_over_context_parallel_ranks(packed, tmp_path):
    case = _with_transformer_engine(2, packed)
    torch.multiprocessing.spawn(_check, (f"file://{tmp_path}/store", 2, case), nprocs=2)


def _check(rank: int, store: str, size: int, case: Case) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=size)
    assert cases.check(case, tolerance=0.05) > 0
    dist.destroy_process_group()


def test_the_digits_are_learnt(tmp_path):
    sizes = ["--vision-dp", "1", "--language-pp", "1", "--language-dp", "1", "--colocated"]
    log = tmp_path / "losses.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += [str(EXAMPLE), *sizes, "--steps", "60", "--log-losses", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
