"""Worlds of real ranks: started once a size, reused by every test, gone with the test run.

A rank is a process with gloo. A forkserver imports torch and Megatron once, so that a world starts
in a second. A test hands over a function by its name; every rank calls it and answers with what it
returned or raised. Waits are bounded: a world that hangs or loses a rank is killed and replaced.
"""

import atexit
import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any

TIMEOUT = timedelta(seconds=60)
MAX_THREADS = 500  # of a world, which is replaced: groups that nobody gives back have some
MAX_WAITING = 10  # ranks that wait for work besides those that have some
REHEARSE = True  # whether worlds demand what NCCL demands, unless a test says otherwise
_worlds: dict[tuple[int, bool], "World"] = {}


class RankError(AssertionError):
    """What went wrong on some ranks: rank -> (name of the exception's class, traceback)."""

    def __init__(self, errors: dict[int, tuple[str, str]]) -> None:
        self.errors = errors
        super().__init__(
            "\n".join(f"--- rank {rank} ---\n{text}" for rank, (_, text) in sorted(errors.items()))
        )


def world(size: int, rehearse: bool = REHEARSE) -> "World":
    """The world of this size, started if need be."""
    key = size, rehearse
    found = _worlds.pop(key, None)
    if found is not None and found.is_alive() and found.num_threads() > MAX_THREADS:
        found.kill()
    if found is None or not found.is_alive():
        found = World(size, rehearse)
    while sum(waiting for waiting, _ in _worlds) > MAX_WAITING:
        _worlds.pop(next(iter(_worlds))).kill()  # the one that was used longest ago
    _worlds[key] = found
    return found


@cache
def start_forkserver() -> Any:
    """The forkserver, with its imports done; it looks for them on PYTHONPATH alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver._forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def forkserver_address() -> dict[str, Any]:
    """Where other processes find the forkserver of this one, which outlives them.

    What its ranks print goes nowhere, as if a test had captured it.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    for fd, _ in kept:
        os.dup2(nowhere, fd)
    try:
        start_forkserver()
    finally:
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
    os.close(nowhere)
    server = vars(forkserver._forkserver)
    return {name: value for name, value in server.items() if isinstance(value, str | bytes)}


def use_forkserver(address: dict[str, Any]) -> None:
    """Start ranks from another process's forkserver."""
    vars(forkserver._forkserver).update(
        address,
        _forkserver_alive_fd=os.open(os.devnull, os.O_RDONLY),
        ensure_running=resource_tracker.ensure_running,
    )


class World:
    """``size`` ranks that wait for work."""

    def __init__(self, size: int, rehearse: bool = REHEARSE) -> None:
        context = start_forkserver()
        self.size = size
        self._store = tempfile.mkdtemp(prefix="ranks-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, size, f"{self._store}/store", rehearse),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def is_alive(self) -> bool:
        """Whether all ranks wait for work."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def num_threads(self) -> int:
        """Of all ranks."""
        return sum(len(os.listdir(f"/proc/{each.pid}/task")) for each in self._processes)

    def run(
        self, function: str | Callable[..., Any], *args: Any, timeout: timedelta = TIMEOUT
    ) -> list[Any]:
        """Call a function of a test module on every rank.

        Args:
            function: the function, or its name as ``module:function``.
            args: what it is called with.
            timeout: how long the slowest rank may take.

        Returns:
            What each rank returned.

        Raises:
            RankError: any rank raised, died or did not answer in time; the world is gone then.
        """
        answers, errors = self.try_run(function, *args, timeout=timeout)
        if errors:
            raise RankError(errors)
        return [answers[rank] for rank in range(self.size)]

    def try_run(
        self, function: str | Callable[..., Any], *args: Any, timeout: timedelta = TIMEOUT
    ) -> tuple[dict[int, Any], dict[int, tuple[str, str]]]:
        """Like :meth:`run`, but returns the answers and the errors by rank."""
        if callable(function):
            function = f"{function.__module__}:{function.__name__}"
        for pipe in self._pipes:
            pipe.send((function, args, sys.path))
        answers: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}
        deadline = monotonic() + timeout.total_seconds()
        while len(answers) + len(errors) < self.size:
            waiting = [
                pipe
                for rank, pipe in enumerate(self._pipes)
                if rank not in answers and rank not in errors
            ]
            # Once a rank has raised, its peers wait in vain: give them little time to say so.
            ready = wait(waiting, timeout=min(deadline - monotonic(), 5 if errors else 1e6))
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    succeeded, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, ("ProcessDied", "the process is gone")
                (answers if succeeded else errors)[rank] = value
            if not ready:
                for rank in sorted(self._pipes.index(pipe) for pipe in waiting):
                    errors[rank] = ("Timeout", f"no answer in time; it is at\n{self._stack(rank)}")
        if (errors and not all(name == "ValueError" for name, _ in errors.values())) or (
            errors and len(errors) < self.size
        ):
            self.kill()
        return answers, errors

    def _stack(self, rank: int) -> str:
        """Where a rank hangs."""
        path, process = Path(self._store, f"stack-{rank}"), self._processes[rank]
        if process.pid is None or not process.is_alive():
            return "its end"
        os.kill(process.pid, signal.SIGUSR1)
        for _ in range(20):
            sleep(0.1)
            if path.read_text().count("File ") and process.is_alive():
                break
        return path.read_text()

    def kill(self) -> None:
        """End all ranks, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
        shutil.rmtree(self._store, ignore_errors=True)


@atexit.register
def kill_all() -> None:
    """Leave no process behind."""
    for each in _worlds.values():
        each.kill()


def _serve(pipe: Connection, rank: int, size: int, store: str, rehearse: bool) -> None:
    """The life of a rank."""
    import torch
    import torch.distributed as dist

    from megatron_mimo_coord.cpu import enable_cpu_ranks

    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"megatron_mimo_coord\.(?!cpu\.)")
    # Megatron's distributed optimizer looks for it on its shards, which views of weights are.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ["WORLD_SIZE"] = str(size)
    faulthandler.enable()  # a rank that crashes prints where
    # The file stays open: whoever waits for this rank may ask where it hangs.
    faulthandler.register(signal.SIGUSR1, open(f"{Path(store).parent}/stack-{rank}", "w"))  # noqa: SIM115
    torch.set_num_threads(1)
    enable_cpu_ranks(rehearse)
    share_one_gloo_device()
    if rehearse:
        _finalize_without_host_sync()
    dist.init_process_group(
        "nccl" if rehearse else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    while True:
        try:
            function, args, sys.path[:] = pipe.recv()
        except EOFError:
            return
        module, name = function.split(":")
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception as error:  # every failure of a rank is the parent's to report
            answer = (False, (type(error).__name__, traceback.format_exc()))
        gc.collect()  # each process group has a thread that wakes often, and models hold groups
        pipe.send(answer)
        if not answer[0] and answer[1][0] != "ValueError":
            return  # as a trainer's rank ends: its peers must not wait for it


def share_one_gloo_device() -> None:
    """Give all process groups one thread for their sockets; alone, each wakes up all the time."""
    import torch.distributed as dist

    gloo = dist.ProcessGroupGloo
    device = gloo.create_default_device()

    def create(asked: Any, _: Any) -> Any:
        options = gloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, asked.timeout
        group = gloo(asked.store, asked.group_rank, asked.group_size, options)
        group.options.global_ranks_in_group = asked.global_ranks_in_group
        group.options.group_name = asked.group_id
        return group

    dist.Backend._plugins["GLOO"] = dist.Backend._BackendPlugin(create, True)


def _finalize_without_host_sync() -> None:
    """Have every finalize of a coordinator run inside ``no_host_sync``; Megatron's timers wait."""
    from megatron_mimo_coord import MultiModuleCoordinator
    from megatron_mimo_coord.cpu import no_host_sync

    original = MultiModuleCoordinator.finalize_model_grads

    def finalize_model_grads(self: Any, *args: Any, **options: Any) -> None:
        config = self._schedule.config
        with nullcontext() if config and config.timers else no_host_sync():
            original(self, *args, **options)

    MultiModuleCoordinator.finalize_model_grads = finalize_model_grads  # type: ignore[method-assign]
