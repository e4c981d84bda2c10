"""Timelines as Chrome Trace JSON, which Perfetto and chrome://tracing open.

A process is a module; a thread is one of its stages where a step was simulated, one of its ranks
where it was measured. The form is the "Trace Event Format" of the Chromium project.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from megatron_mimo_coord.planning.timeline import Span, Timeline

Threads = Mapping[tuple[str, int], Iterable[Span]]
"""Spans of each thread: what its number counts (``"stage"`` or ``"rank"``), and its number."""


def chrome_trace(threads: Threads) -> dict[str, Any]:
    """Spans as a trace: times are in microseconds.

    Args:
        threads: spans of each thread.

    Example:
        >>> span = Span("forward", "vision", stage=0, start=0.5, end=1.0, microbatch=3)
        >>> *names, event = chrome_trace({("rank", 7): [span]})["traceEvents"]
        >>> event["name"], event["ts"], event["dur"], event["pid"], event["tid"]
        ('forward 3', 500000.0, 500000.0, 0, 7)
        >>> [each["args"]["name"] for each in names]
        ['vision', 'rank 7']
    """
    spans = [(kind, number, span) for (kind, number), of in threads.items() for span in of]
    modules = list(dict.fromkeys(span.module for _, _, span in spans))
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(spans, modules))}


def write_trace(threads: Threads, path: str | Path) -> None:
    """Write spans to a file that Perfetto opens.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(json.dumps(chrome_trace(threads)), encoding="utf-8")


def stage_threads(timeline: Timeline) -> Threads:
    """A simulated step, a thread for each stage."""
    threads: dict[tuple[str, int], list[Span]] = {}
    for span in timeline.spans:
        threads.setdefault(("stage", span.stage), []).append(span)
    return threads


def rank_threads(steps: Iterable[tuple[float, Mapping[int, Iterable[Span]]]]) -> Threads:
    """Measured steps, one behind the other, a thread for each rank.

    Args:
        steps: for each step, when it began in seconds, and the spans of each rank.
    """
    threads: dict[tuple[str, int], list[Span]] = {}
    for begin, step in steps:
        for rank, spans in step.items():
            threads.setdefault(("rank", rank), []).extend(
                evolve(span, start=begin + span.start, end=begin + span.end) for span in spans
            )
    return threads


def _events(spans: list[tuple[str, int, Span]], modules: list[str]) -> Iterator[dict[str, Any]]:
    for pid, module in enumerate(modules):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": module}}
    for kind, number, module in dict.fromkeys((kind, n, span.module) for kind, n, span in spans):
        yield {
            "ph": "M",
            "name": "thread_name",
            "pid": modules.index(module),
            "tid": number,
            "args": {"name": f"{kind} {number}"},
        }
    for _, number, span in spans:
        details = {"stage": span.stage, "microbatch": span.microbatch, "bridge": span.bridge}
        yield {
            "ph": "X",
            "name": span.kind if span.microbatch is None else f"{span.kind} {span.microbatch}",
            "cat": span.kind,
            "pid": modules.index(span.module),
            "tid": number,
            "ts": span.start * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "args": {name: value for name, value in details.items() if value is not None},
        }
