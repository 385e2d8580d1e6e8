"""The report page: one HTML file with everything inside, readable on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from stepcell.overwrite import MARK
from stepcell.runtime.engine.layers import EngineLayer, LayerTensor
from stepcell.runtime.verify.report.plot import Series, line_plot
from stepcell.runtime.verify.results import Growth, Report, Verdict, WarmError

__all__ = ["QUESTIONS", "growth_plot", "page", "warm_plot"]

QUESTIONS = {
    "identity": "Is the graph what its checkpoint says?",
    "growth": "How large is the error of a free run?",
    "prediction": "Do single-step errors predict it, or does a state stall?",
    "storage": "Is the state stored precisely enough for its updates?",
    "bound": "How large can the error of a run of any length be?",
    "liveness": "Does every state matter?",
    "pairing": "Is each state fed back to its own input?",
    "isolation": "Are the rows of a batch independent?",
    "reset": "Does a reset clear everything?",
    "resume": "Does the step depend on its inputs and states alone?",
    "precision": "Is it computed in the precision of the contract?",
}

_NOTHING = 1e-300  # a limit that says "none" or "any", and is no figure to be shown
_STYLE = """
:root{--ink:#1b2230;--soft:#5b6474;--rule:#dfe3ea;--back:#fff;--card:#f6f7f9;
--good:#0f7a4d;--bad:#c2251d;--open:#7a6a12}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--rule:#323947;--back:#14171d;--card:#1d222b;
--good:#3fc48a;--bad:#ff7a70;--open:#d6bd4a;--line-0:#6ea0ff;--line-1:#ff9562;--line-2:#40c79b;--line-3:#c98ae8;
--line-4:#e0b646;--line-5:#9fb0c6}}
*{box-sizing:border-box}body{margin:0 auto;max-width:46rem;padding:1.2rem 1rem 3rem;background:var(--back);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.35rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2rem 0 .6rem}p{margin:.3rem 0}.soft{color:var(--soft)}
.answer{font-weight:600;font-size:1.1rem}
.good{color:var(--good)}.bad{color:var(--bad)}.open{color:var(--open)}
.verdict{border-left:4px solid currentColor;background:var(--card);
padding:.6rem .8rem;margin:.5rem 0;border-radius:0 6px 6px 0}
.verdict div{color:var(--ink)}
.verdict .soft{color:var(--soft);font-size:.9rem}.verdict b{font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;min-width:100%}
th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
svg{width:100%;max-width:38rem;height:auto;display:block;margin:.4rem 0}
"""


def page(report: Report) -> str:
    """The whole document."""
    failed = [verdict for verdict in report.verdicts if verdict.passed is False]
    if failed:
        answer = f'<p class="answer bad">✗ failed: {html.escape(", ".join(verdict.name for verdict in failed))}</p>'
    else:
        asked = sum(verdict.passed is not None for verdict in report.verdicts)
        answer = f'<p class="answer good">✓ passed: {asked} questions asked, none failed</p>'
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="{MARK}">',
        f"<title>{html.escape(report.model)}: verified</title><style>{_STYLE}</style></head><body>",
        f'<p class="soft">stepcell verify</p><h1>{html.escape(report.model)}</h1>',
        answer,
        f'<p class="soft">{report.steps} steps against {html.escape(report.reference)}, '
        f"on {html.escape(report.device)}, {html.escape(report.date)}</p>",
        "<h2>Verdicts</h2>",
        *(_verdict(verdict) for verdict in _ordered(report.verdicts)),
        "<h2>Error growth</h2>",
        "<p>Both sides run freely over the same frames, each feeding back its own states. Lines are rms errors; dashed "
        "is what the precision costs by itself.</p>",
        growth_plot(report.growth),
        _growth_table(report.growth),
    ]
    if any(each.predicted for each in report.warm):
        parts += [
            "<h2>Measured and predicted</h2>",
            f"<p>From warm states on, after {report.warm_up} steps of the reference: the error of the free run, and "
            "dashed the one that its single steps predict. Where they differ, a state stalls.</p>",
            warm_plot(report.warm),
        ]
    if report.layers:
        parts += ["<h2>Kernels of the engine</h2>", _layer_table(report.layers)]
    parts += ["<h2>What was compared</h2>", _facts(report), "</body></html>"]
    return "\n".join(parts) + "\n"


def growth_plot(growth: Sequence[Growth]) -> str:
    """Free-running rms errors over the steps, the largest first."""
    ordered = sorted(growth, key=lambda each: -max(each.rms, default=0.0))
    series = [Series(each.name, each.steps, each.rms) for each in ordered]
    series += [
        Series(f"{each.name}, allowed", each.steps, each.peer_rms, like=index)
        for index, each in enumerate(ordered)
        if each.peer_rms
    ]
    return line_plot("rms error of a free run", series, x_label="step", y_label="")


def warm_plot(warm: Sequence[WarmError]) -> str:
    """Measured and predicted rms errors in the warm window."""
    ordered = sorted((each for each in warm if each.predicted), key=lambda each: -max(each.measured, default=0.0))
    series = []
    for index, each in enumerate(ordered):
        steps = range(1, len(each.measured) + 1)
        series.append(Series(each.name, steps, each.measured))
        series.append(Series(f"{each.name}, predicted", steps, each.predicted, like=index))
    solid = [each for each in series if each.like is None]
    dashed = [each for each in series if each.like is not None]
    return line_plot("rms error of a state", [*solid, *dashed], x_label="step of the warm window", y_label="")


def _ordered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Failed ones first, then passed, then those that could not be asked."""
    return sorted(verdicts, key=lambda verdict: {False: 0, True: 1, None: 2}[verdict.passed])


def _verdict(verdict: Verdict) -> str:
    kind, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "·")}[verdict.passed]
    numbers = ""
    if verdict.value is not None and verdict.limit is not None and abs(verdict.limit) > _NOTHING:
        relation = "at least" if verdict.at_least else "at most"
        numbers = f'<div class="soft">{_figure(verdict.value)}, {relation} {_figure(verdict.limit)}</div>'
    question = html.escape(QUESTIONS[verdict.name])
    return (
        f'<div class="verdict {kind}">{mark} <b>{html.escape(verdict.name)}</b> <span class="soft">{question}</span>'
        f"<div>{html.escape(verdict.says)}</div>{numbers}</div>"
    )


def _growth_table(growth: Sequence[Growth]) -> str:
    if not growth:
        return ""
    head = "".join(f"<th>{step}</th>" for step in growth[0].steps)
    rows = "".join(
        f"<tr><td>{html.escape(each.name)}</td><td>{_figure(each.scale)}</td>"
        + "".join(f"<td>{_figure(value)}</td>" for value in each.max_abs)
        + "</tr>"
        for each in growth
    )
    return (
        '<p class="soft">Largest absolute difference at each step; the second column is the largest value of the '
        f'reference.</p><div class="wide"><table><tr><th></th><th>size</th>{head}</tr>{rows}</table></div>'
    )


def _layer_table(layers: Sequence[EngineLayer]) -> str:
    """What every kernel reads, holds and writes, by dtype."""
    rows = "".join(
        f"<tr><td>{html.escape(layer.name)}</td><td>{html.escape(layer.kind)}</td>"
        + "".join(f"<td>{_dtypes(tensors)}</td>" for tensors in (layer.inputs, layer.constants, layer.outputs))
        + "</tr>"
        for layer in layers
    )
    head = "".join(f"<th>{name}</th>" for name in ("kernel", "kind", "reads", "holds", "writes"))
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _dtypes(tensors: Sequence[LayerTensor]) -> str:
    return html.escape(", ".join(dict.fromkeys(tensor.dtype for tensor in tensors)))


def _facts(report: Report) -> str:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report.shapes.items())
    facts = {
        "model": report.model,
        "SHA-256": report.model_sha256,
        "runs in": report.subject_runs,
        "device": report.device,
        "reference": report.reference,
        "computed by": report.reference_runs,
        "input": report.input,
        "sizes": shapes,
        "steps": f"{report.steps} from the start, {report.warm_up} to warm up the reference",
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "took": f"{report.seconds:.1f} s",
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()) + "</dl>"


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "infinite"
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
