"""What benchmark_finalize.py runs on every rank: models, three finalizers, a clock, GPU checks."""

import gc
import itertools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as finalize_module
from vlm import LANGUAGE, EncoderShape, LanguageShape, ModelShape, build_model, submodules

from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism, MultiModuleCoordinator

if TYPE_CHECKING:
    from benchmark_finalize import Case

VISION = "vision"
BARE, FUNCTIONAL, COORDINATOR = "bare", "functional", "coordinator"
Seconds = Mapping[str, Sequence[float]]
"""For each finalizer, how long each round of it took."""
TOKENS = 1000  # that each language replica counts


def machine() -> str:
    """What the figures were measured on."""
    ranks, versions = dist.get_world_size(), f"torch {torch.__version__}"
    if dist.get_backend() == "nccl":
        return f"{ranks} ranks over NCCL, {torch.cuda.get_device_name()}, {versions}"
    return f"{ranks} CPU ranks over gloo on {os.cpu_count()} cores, {versions}"


@contextmanager
def process_groups(modules: Mapping[str, ModuleParallelism]) -> Iterator[MegatronMIMOInfra]:
    """Grids and groups of a layout, given back afterwards."""
    infra = MegatronMIMOInfra.build(modules)
    yield infra
    dist.barrier()
    infra.destroy()


# -- the three finalizers --------------------------------------------------------------------------


@frozen
class Bare:
    """DDP's own reductions, module by module. Its gradients are not those of one loss."""

    ddps: Mapping[str, DistributedDataParallel]
    infra: MegatronMIMOInfra

    def zero(self) -> None:
        """Get ready for a step."""
        for ddp in self.ddps.values():
            ddp.zero_grad_buffer()

    def finalize(self, num_tokens: torch.Tensor | None) -> None:
        """Reduce."""
        for name, ddp in self.ddps.items():
            finalize_module([ddp], None, pg_collection=self.infra.pg_collections[name])


@frozen
class Functional(Bare):
    """Reduces as ``Bare`` does, then corrects the result in a pass over whole buffers."""

    def finalize(self, num_tokens: torch.Tensor | None) -> None:
        """Reduce, then scale."""
        super().finalize(None)
        if num_tokens is None:
            self._scale_encoder()
        else:
            self._divide_by_tokens(num_tokens)

    def _scale_encoder(self) -> None:
        """From the mean over encoder replicas to the mean over language replicas."""
        grids = self.infra.module_to_grid_map
        encoder_dp, language_dp = (grids[name].shape[2] for name in (VISION, LANGUAGE))
        if VISION in self.ddps and encoder_dp != language_dp:
            self.ddps[VISION].scale_gradients(encoder_dp / language_dp)

    def _divide_by_tokens(self, num_tokens: torch.Tensor) -> None:
        """The language model's last stage knows how many tokens there are, and tells all."""
        groups = self.infra.pg_collections[LANGUAGE]
        if groups is not None and groups.pp.rank() == groups.pp.size() - 1:
            dist.all_reduce(num_tokens, group=groups.dp_cp)
        dist.broadcast(num_tokens, src=dist.get_world_size() - 1)
        for ddp in self.ddps.values():
            ddp.scale_gradients(1.0 / num_tokens.clamp(min=1))


@frozen
class Coordinated(Bare):
    """The coordinator. Its model is its own: it sets how DDP scales."""

    coordinator: MultiModuleCoordinator

    def zero(self) -> None:
        """Get ready for a step."""
        self.coordinator.zero_grad_buffer()

    def finalize(self, num_tokens: torch.Tensor | None) -> None:
        """Reduce to the gradient of the one loss."""
        self.coordinator.finalize_model_grads(None, num_tokens)


# -- a case, and the clock -------------------------------------------------------------------------


@frozen
class Bench:
    """The finalizers of one case on this rank."""

    case: "Case"
    finalizers: Mapping[str, Bare]
    num_tokens: torch.Tensor | None
    clock: Callable[[], float]

    @classmethod
    def build(cls, case: "Case", infra: MegatronMIMOInfra, options: Namespace) -> "Bench":
        """Two models of the same shape: one for the coordinator, one that it never touched."""
        gc.collect()  # the models of the case before
        shape = model_shape(case, options)
        infra.initialize_megatron(seed=1)
        plain, coordinated = (
            build_model(shape, infra.module_to_grid_map, infra.pg_collections) for _ in range(2)
        )
        return cls(
            case,
            {
                BARE: Bare(submodules(plain), infra),
                FUNCTIONAL: Functional(submodules(plain), infra),
                COORDINATOR: Coordinated(
                    submodules(coordinated), infra, MultiModuleCoordinator(infra, coordinated)
                ),
            },
            count_tokens(infra) if case.loss == "per-token" else None,
            time.process_time if options.clock == "cpu" else time.perf_counter,
        )

    def measure(self, rounds: int) -> dict[str, Seconds]:
        """Run the finalizers in turns, in every order; times of each module, on every rank."""
        self.warm_up()
        seconds: dict[str, list[float]] = {name: [] for name in self.finalizers}
        orders = itertools.cycle(itertools.permutations(self.finalizers))
        for order in itertools.islice(orders, rounds):
            for name in order:
                seconds[name].append(self.time(self.finalizers[name]))
        here = " + ".join(self.finalizers[BARE].ddps)
        everywhere: list[tuple[str, Seconds]] = [("", {})] * dist.get_world_size()
        dist.all_gather_object(everywhere, (here, seconds))
        return {
            module: slowest([times for name, times in everywhere if name == module])
            for module in dict.fromkeys(name for name, _ in everywhere)
        }

    def warm_up(self) -> None:
        """Two steps, since DDP does not overlap in its first; and what they give must agree."""
        for _ in range(2):
            results = {name: self.reduce(each) for name, each in self.finalizers.items()}
        for got, expected in zip(results[COORDINATOR], results[FUNCTIONAL], strict=True):
            torch.testing.assert_close(got, expected)

    def time(self, finalizer: Bare) -> float:
        """Seconds that one finalizer takes when all ranks start together."""
        tokens = self.prepare(finalizer)
        torch.cuda.synchronize()
        dist.barrier()
        start = self.clock()
        self.step(finalizer, tokens)
        torch.cuda.synchronize()
        return self.clock() - start

    def reduce(self, finalizer: Bare) -> list[torch.Tensor]:
        """Run one finalizer, untimed; what this rank has then."""
        self.step(finalizer, self.prepare(finalizer))
        return [grads.clone() for grads in own_gradients(finalizer.ddps.values())]

    def prepare(self, finalizer: Bare) -> torch.Tensor | None:
        """Fresh gradients, and the token count, which the functional finalizer overwrites."""
        finalizer.zero()
        fill(finalizer.ddps.values())
        return None if self.num_tokens is None else self.num_tokens.clone()

    def step(self, finalizer: Bare, num_tokens: torch.Tensor | None) -> None:
        """What is timed.

        With overlap that is all from the last backward's first launch: each parameter is reported
        as backward's hooks do, which launches the reductions, and then they are waited for. There
        is no backward to hide them behind, so the figures show the whole of what is done, not the
        part that a training step would notice.
        """
        if self.case.overlap:
            for ddp in finalizer.ddps.values():
                report_gradients(ddp)
        finalizer.finalize(num_tokens)

    def check_on_gpu(self) -> list[str]:
        """Does the coordinator's finalize wait for the device, and does a CUDA graph hold it?"""
        if not torch.cuda.is_available() or dist.get_backend() != "nccl":
            return [
                'no CUDA here: finalize under torch.cuda.set_sync_debug_mode("error") and in a '
                "CUDA graph are skipped, since a CPU has no queue of work to wait for or to record"
            ]
        found = {"no host sync": self.check_for_syncs, "held by a CUDA graph": self.check_graph}
        where = f"{self.case.layout}, {self.case.loss}, overlap {self.case.overlap}"
        where += f", distributed optimizer {self.case.distributed_optimizer}"
        return [f"{where}: {what}: {outcome(check)}" for what, check in found.items()]

    def check_for_syncs(self) -> None:
        """Raises RuntimeError where the host waits for the device."""
        finalizer = self.finalizers[COORDINATOR]
        tokens = self.prepare(finalizer)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(finalizer, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def check_graph(self) -> None:
        """Raises RuntimeError if capture fails, AssertionError if a replay gives other results."""
        finalizer = self.finalizers[COORDINATOR]
        expected = self.reduce(finalizer)
        tokens = self.prepare(finalizer)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread queries events meanwhile, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step(finalizer, tokens)
        for _ in range(2):
            fill(finalizer.ddps.values())
            graph.replay()
            for got, wanted in zip(own_gradients(finalizer.ddps.values()), expected, strict=True):
                torch.testing.assert_close(got, wanted)


def model_shape(case: "Case", options: Namespace) -> ModelShape:
    """Modules of the chosen sizes, trained as the case says."""
    ddp = {
        "overlap_grad_reduce": case.overlap,
        "use_distributed_optimizer": case.distributed_optimizer,
        "num_buckets": options.buckets if case.overlap else None,
    }
    names = (VISION, LANGUAGE)
    return ModelShape(
        encoders={
            VISION: EncoderShape(
                patches=4,
                patch_dim=16,
                token_id=31,
                layers=options.encoder_layers,
                hidden=options.encoder_hidden,
            )
        },
        language=LanguageShape(
            vocabulary=32,
            sequence=16,
            layers=options.language_layers,
            hidden=options.language_hidden,
        ),
        per_token=dict.fromkeys(names, case.loss == "per-token"),
        ddp=dict.fromkeys(names, ddp),
    )


def count_tokens(infra: MegatronMIMOInfra) -> torch.Tensor:
    """What the schedule passes: a count on the language model's last stage, 0 elsewhere."""
    groups = infra.pg_collections[LANGUAGE]
    counts = groups is not None and groups.pp.rank() == groups.pp.size() - 1
    return torch.tensor(TOKENS if counts else 0, dtype=torch.int, device="cuda")


def fill(ddps: Sequence[DistributedDataParallel]) -> None:
    """Gradients that differ between ranks, so that a sum is not a mean."""
    for ddp in ddps:
        for buffer in ddp.buffers:
            buffer.grad_data.fill_(1.0 + dist.get_rank())


def report_gradients(ddp: DistributedDataParallel) -> None:
    """Tell DDP that every gradient is there, last layer first, as the hooks of backward do."""
    for param in reversed(ddp.params_with_grad):
        ddp.param_to_bucket_group[param].register_grad_ready(param)


def own_gradients(ddps: Sequence[DistributedDataParallel]) -> list[torch.Tensor]:
    """This rank's share of each bucket, which is reduced whatever the optimizer."""
    return [
        bucket.grad_data.chunk(ddp.dp_cp_group.size())[ddp.dp_cp_group.rank()]
        for ddp in ddps
        for group in ddp.bucket_groups
        for bucket in group.buckets
    ]


def slowest(ranks: Sequence[Seconds]) -> Seconds:
    """Round by round, the time of the last rank to finish: the module is ready only then."""
    return {
        name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }


def outcome(check: Callable[[], None]) -> str:
    """Whether a check passed, and if not why."""
    try:
        check()
    except (RuntimeError, AssertionError) as error:
        return f"FAILED: {error}"
    return "yes"
