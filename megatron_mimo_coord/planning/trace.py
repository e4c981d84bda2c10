"""Timelines as Chrome Trace JSON, which Perfetto and chrome://tracing open.

A process is a module; a thread is one of its stages where a step was simulated, one of its ranks
where it was measured. The form is the "Trace Event Format" of the Chromium project.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_mimo_coord.planning.timeline import Span

Thread = tuple[str, int, float, Iterable[Span]]
"""What its number counts (``"stage"`` or ``"rank"``), its number, when its clock was 0, spans."""


def chrome_trace(threads: Iterable[Thread]) -> dict[str, Any]:
    """Spans as a trace: times are in microseconds.

    Example:
        >>> span = Span("forward", "vision", stage=0, start=0.5, end=1.0, microbatch=3)
        >>> process, thread, event = chrome_trace([("rank", 7, 0.0, [span])])["traceEvents"]
        >>> event["name"], event["ts"], event["dur"], event["pid"], event["tid"]
        ('forward 3', 500000.0, 500000.0, 0, 7)
        >>> process["args"]["name"], thread["args"]["name"]
        ('vision', 'rank 7')
    """
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(threads))}


def _events(threads: Iterable[Thread]) -> Iterator[dict[str, Any]]:
    processes: dict[str, int] = {}
    named = set()
    for kind, number, begin, spans in threads:
        for span in spans:
            if span.module not in processes:
                processes[span.module] = len(processes)
                yield _name("process_name", span.module, pid=processes[span.module])
            pid = processes[span.module]
            if (pid, number) not in named:
                named.add((pid, number))
                yield _name("thread_name", f"{kind} {number}", pid=pid, tid=number)
            details = {"stage": span.stage, "microbatch": span.microbatch, "bridge": span.bridge}
            yield {
                "ph": "X",
                "name": span.kind if span.microbatch is None else f"{span.kind} {span.microbatch}",
                "cat": span.kind,
                "pid": pid,
                "tid": number,
                "ts": (begin + span.start) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {name: value for name, value in details.items() if value is not None},
            }


def _name(what: str, name: str, **of: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, **of, "args": {"name": name}}
