"""Jobs as a user starts them with torchrun, without its interpreters' imports.

torchrun's own launcher starts the ranks and starts them again; but they are forks of a process
that has imported everything, and run the script with the arguments of the command line.
"""

import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from ranks import start_forkserver


def run_job(
    script: Path | str, *arguments: str, ranks: int, restarts: int = 0, **environment: str
) -> tuple[int, str]:
    """Run ``torchrun --nproc-per-node RANKS SCRIPT ARGUMENTS``, for at most two minutes.

    Returns:
        Its exit code (None after two minutes), and all that it and its ranks printed, in that order.
    """
    with tempfile.NamedTemporaryFile() as output:
        launcher = start_forkserver().Process(
            target=_launch,
            args=((str(script), *arguments), ranks, restarts, output.name, environment),
        )
        launcher.start()
        try:
            launcher.join(120)
        finally:
            if launcher.is_alive():
                os.killpg(launcher.pid, signal.SIGKILL)
        return launcher.exitcode, Path(output.name).read_text()


def _launch(
    command: tuple[str, ...], ranks: int, restarts: int, output: str, environment: dict[str, str]
) -> None:
    """What ``torchrun`` does, given its options."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    _print_into(output)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(config, _run_script)(*command)


def _print_into(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
        os.dup2(file, standard.fileno())


def _run_script(*arguments: Any) -> None:
    """What a rank does: ``python SCRIPT ARGUMENTS``."""
    sys.argv[:] = arguments
    sys.path[0:0] = [str(Path(arguments[0]).resolve().parent)]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
