"""Report of benchmarks/kernels.py as Markdown: the comparison, the targets, every contender, the tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Verdict", "report", "strongest", "verdicts"]

OURS = {"float16": "stepcell, float16 state", "float32": "stepcell, float32 state"}
HALF_AGAIN = ("S1 small", "S2 medium", "S5 matting")  # target: a speedup of 1.5
LAUNCH_BOUND = 5.0  # microseconds: with a lower floor, launches dominate the step
FLOOR_COUNTS = 10.0  # microseconds: with a higher floor, the floor is a realistic target
WAYS = ("isolated", "chain")


@dataclass(frozen=True)
class Verdict:
    """One target on one case.

    Attributes:
        value: the result, by the worse of the two timings; None: not run.
        wanted: minimum, or maximum if `target` is about the floor.
    """

    target: str
    case: str
    state: str
    value: float | None
    wanted: float

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        if "floor" in self.target:
            return self.value <= self.wanted
        return self.value >= self.wanted and self.value > 1  # equal is not faster


def strongest(case: dict[str, Any], way: str = "isolated") -> tuple[str, float] | None:
    """The fastest peer, and its median in microseconds."""
    ran = {name: _median(each, way) for name, each in case["contenders"].items() if each["role"] == "peer"}
    known = {name: value for name, value in ran.items() if value is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Every target on every case, for both dtypes of the state."""
    found = []
    for case in result["cases"]:
        floor = case["floor_microseconds"]["floor"]
        wanted = [("faster than the strongest baseline", 1.0)]
        wanted += [("1.5 times as fast on S1, S2 and S5", 1.5)] if case["name"] in HALF_AGAIN else []
        wanted += [("2 times as fast where launches decide", 2.0)] if floor < LAUNCH_BOUND else []
        for state, name in OURS.items():
            if name not in case["contenders"]:
                continue
            speed = [_speed(case, name, way) for way in WAYS]
            worst = None if None in speed else min(filter(None, speed))
            found += [Verdict(target, case["name"], state, worst, least) for target, least in wanted]
            if floor > FLOOR_COUNTS:
                times = [_best(case, name, way) for way in WAYS]
                slower = None if None in times else max(filter(None, times)) / floor
                found.append(Verdict("within 2 times of the floor", case["name"], state, slower, 2.0))
    return found


def report(result: dict[str, Any]) -> str:
    """The whole report; if the benchmark was not run, the reason."""
    if "not_run" in result:
        return f"Not run: {result['not_run']}.\n"
    parts = [_conditions(result), _comparison(result), _targets(result), _contenders(result), _tiles(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _median(contender: dict[str, Any], way: str) -> float | None:
    return contender["microseconds"][way]["median"] if "microseconds" in contender else None


def _best(case: dict[str, Any], name: str, way: str) -> float | None:
    """Our smallest median over the variants among which TensorRT would choose: tiles, overlapping launches."""
    tried = (each for key, each in case["contenders"].items() if f"{key}, ".startswith(f"{name}, "))
    known = [value for each in tried if (value := _median(each, way)) is not None]
    return min(known, default=None)


def _speed(case: dict[str, Any], name: str, way: str) -> float | None:
    """Speedup over the strongest baseline."""
    own, rival = _best(case, name, way), strongest(case, way)
    return rival[1] / own if own is not None and rival is not None else None


def _conditions(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    ceilings = result["ceilings"]
    return (
        f"{result['device']} (compute capability {result['capability']}); {versions}. Measured in the same run: "
        f"a copy moves {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, a matrix product in half does "
        f"{ceilings['flop_per_second'] / 1e12:.0f} TFLOP/s; the floor of a step is the longer of the two, "
        "for half states.\n\nMicroseconds per step: isolated graph replay / a step in a chain of 16; medians, "
        f"in brackets the 10th to 90th percentile.\n\nTensorRT-RTX on this device: {_rtx(result)}."
    )


def _rtx(result: dict[str, Any]) -> str:
    """Whether TensorRT-RTX runs on this GPU; its support matrix excludes some."""
    found = [each for c in result["cases"] for name, each in c["contenders"].items() if name.startswith("TensorRT-RTX")]
    if any("microseconds" in each for each in found):
        return "runs"
    return f"does not run ({found[0]['not_run']})" if found else "not tried"


def _comparison(result: dict[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        cells = [f"{case['floor_microseconds']['floor']:.1f}"]
        for name in OURS.values():
            times = [_best(case, name, way) for way in WAYS]
            speeds = [_speed(case, name, way) for way in WAYS]
            cells += [_pair(times, ".1f"), _pair(speeds, ".2f")]
        cells.append(_pair([_of_floor(case, OURS["float16"], way) for way in WAYS], ".1f"))
        cells.append(_strongest_text(case))
        rows.append([case["name"], *cells])
    heads = ["case", "floor", "stepcell, float16 state", "times as fast as the strongest baseline"]
    heads += ["stepcell, float32 state", "times as fast", "float16 state, times the floor", "strongest baseline"]
    return _table(heads, rows)


def _strongest_text(case: dict[str, Any]) -> str:
    isolated, chain = (strongest(case, way) for way in WAYS)
    if isolated is None or chain is None:
        return "not run"
    other = "" if chain[0] == isolated[0] else f"{chain[0]}, "
    return f"{isolated[0]}, {isolated[1]:.1f} / {other}{chain[1]:.1f}"


def _of_floor(case: dict[str, Any], name: str, way: str) -> float | None:
    own = _best(case, name, way)
    return None if own is None else own / case["floor_microseconds"]["floor"]


def _targets(result: dict[str, Any]) -> str:
    found = verdicts(result)
    rows = []
    for target in dict.fromkeys(each.target for each in found):
        for state in OURS:
            own = [each for each in found if (each.target, each.state) == (target, state)]
            if not own:
                continue
            missed = [f"{v.case} ({v.value:.2f})" for v in own if v.met is False and v.value is not None]
            met = [f"{v.case} ({v.value:.2f})" for v in own if v.met and v.value is not None]
            unknown = [v.case for v in own if v.met is None]
            word = "missed" if missed else "not run" if not met else "met, as far as run" if unknown else "met"
            rows.append([f"{target}, {state} state", word, *(", ".join(names) for names in (met, missed, unknown))])
    return _table(["target (the worse of both ways of timing)", "", "met on", "missed on", "not run on"], rows)


def _contenders(result: dict[str, Any]) -> str:
    names = dict.fromkeys(name for case in result["cases"] for name in case["contenders"])
    rows = [[name, *(_cell(case["contenders"].get(name)) for case in result["cases"])] for name in names]
    reasons = dict.fromkeys(_reasons(result))
    listing = "\n".join(["", *(f"- {reason}" for reason in reasons)]) if reasons else ""
    return _table(["contender", *(case["name"] for case in result["cases"])], rows) + (
        f"\n\nNot run:\n{listing}" if listing else ""
    )


def _reasons(result: dict[str, Any]) -> Iterator[str]:
    for case in result["cases"]:
        for name, each in case["contenders"].items():
            if "not_run" in each:
                yield f"{name}: {each['not_run']}"


def _cell(contender: dict[str, Any] | None) -> str:
    if contender is None:
        return ""
    if "not_run" in contender:
        return "not run"
    one = contender["microseconds"]["isolated"]
    text = f"{one['median']:.1f} ({one['p10']:.1f} to {one['p90']:.1f}) / {_median(contender, 'chain'):.1f}"
    return f"{text}; eager {_median(contender, 'eager'):.0f}" if "eager" in contender["microseconds"] else text


def _tiles(result: dict[str, Any]) -> str:
    """Kernels whose default tile is not the fastest: changes to make in tiles.py."""
    rows = []
    for case in result["cases"]:
        for kernel, cell in dict.fromkeys((row["kernel"], row["cell"]) for row in case["tiles"]):
            own = [r for r in case["tiles"] if (r["kernel"], r["cell"]) == (kernel, cell) and "microseconds" in r]
            default = next((r for r in own if r["default"]), None)
            best = min(own, key=lambda r: r["microseconds"]["median"], default=None)
            if default and best and best is not default:
                texts = [f"{r['tile']}, {r['microseconds']['median']:.1f}" for r in (default, best)]
                rows.append([case["name"], f"{kernel} of {cell}", *texts])
    return _table(["case", "kernel", "default tile, microseconds", "fastest"], rows) if rows else ""


def _pair(values: list[float | None], form: str) -> str:
    if None in values:
        return "not run"
    return " / ".join(format(value, form) for value in values if value is not None)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])
