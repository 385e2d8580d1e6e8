"""Timing of benchmarks/kernels.py on the device: graph replays, isolated and as a chain of steps."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import States, Step
from torch import Tensor

__all__ = ["CHAIN", "Runs", "captured", "ceilings", "microseconds", "runs_of", "times_of"]

CHAIN = 16  # steps
REPLAYS = 300
# Clock ticks that the device waits before a timed run, so that all of it has been submitted:
# about 0.2 ms for one submission, 1 ms for a chain that is submitted step by step.
_WAIT, _LONG_WAIT = 400_000, 2_000_000

Run = Callable[[], Any]
Spread = dict[str, float]


@dataclass(frozen=True)
class Runs:
    """Functions of a contender that are checked and timed. The timed ones queue their work and return.

    Attributes:
        check: one step of the problem's states with its first input; returns the new states.
        isolated: the same step repeatedly.
        chain: CHAIN steps, each depending on the previous one.
        eager: a step without a CUDA graph, if that is of interest.
        stream: that they use; None: torch's current stream.
        notes: remarks for the result.
    """

    check: Callable[[], States]
    isolated: Run
    chain: Run
    eager: Run | None = None
    stream: Any = None
    notes: tuple[str, ...] = ()


def runs_of(
    step: Step, xs: Sequence[Tensor], states: States, *, eager: bool = False, notes: tuple[str, ...] = ()
) -> Runs:
    """Capture a step that allocates its outputs in torch."""

    def chain() -> States:
        new = states
        for i in range(CHAIN):
            new = step(xs[i % len(xs)], new)
        return new

    def once() -> States:
        return step(xs[0], states)

    graphs: dict[str, Any] = {}  # captured when first timed, after the check

    def replay(name: str, run: Run) -> None:
        if name not in graphs:
            graphs[name] = captured(run)
        graphs[name].replay()

    return Runs(
        once,
        lambda: replay("isolated", once),
        lambda: replay("chain", chain),
        eager=once if eager else None,
        notes=notes,
    )


def captured(run: Run) -> Any:
    """Warm up, then capture the launches of `run`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Run, count: int = REPLAYS, *, wait: int = _WAIT) -> Spread:
    """Median and spread of single runs on the device.

    With `wait` = 0 the device starts at once, so the time includes the host's share, as for a caller without a graph.
    """
    run()
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if wait:
            torch.cuda._sleep(wait)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[8]}


def times_of(runs: Runs) -> dict[str, Spread]:
    """Microseconds per step: isolated, in a chain, and eager if the contender has it."""
    with torch.cuda.stream(runs.stream) if runs.stream is not None else contextlib.nullcontext():
        times = {"isolated": microseconds(runs.isolated)}
        whole = microseconds(runs.chain, REPLAYS // 3, wait=_LONG_WAIT)
        times["chain"] = {name: value / CHAIN for name, value in whole.items()}
        if runs.eager is not None:
            times["eager"] = microseconds(runs.eager, wait=0)
    return times


def ceilings() -> dict[str, float]:
    """Limits of this device: bytes per second of a copy, float16 FLOP per second of a matrix product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    copy = microseconds(lambda: target.copy_(source), 30)["median"]
    product = microseconds(lambda: a @ b, 30)["median"]
    return {"bytes_per_second": 2 * 2**30 / copy * 1e6, "flop_per_second": 2 * 8192**3 / product * 1e6}
