r"""Golden-case recorder: runs a public implementation with random weights and writes inputs, states and outputs.

    python -m tools.record_golden_case ~/src/RAFT core/update.py:ConvGRU \
        --set hidden_dim=8 --set input_dim=12 \
        --input x:TBCHW:6x2x12x9x11 --state h:BCHW:2x8x9x11 --initial random \
        --step raft_step.py:step --licence BSD-3-Clause -o golden/raft_convgru/h8_in12

The run is repeated in float64 with the same weights. docs/adding-a-family.md explains the adapter that
`--step` names and describes the three files of a case.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepcell.cli.common import parse_settings
from stepcell.errors import StepcellError, UsageError
from tools.record_golden_case.recording import Run, call_in_order, randomise, record
from tools.record_golden_case.upstream import function_of_file, importable, named_object, provenance

OUTPUT_LAYOUTS = {2: "BF", 3: "BLF", 4: "BCHW"}


@dataclass(frozen=True)
class ArraySpec:
    """Name, layout and shape of an input or a state.

    Attributes:
        layout: a letter per axis: T time, B batch, C channels, H, W; L position or layer, F features.
    """

    name: str
    layout: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ArraySpec:
        """Parse `NAME:LAYOUT:SHAPE`, such as `x:TBCHW:6x2x3x9x11`.

        Raises:
            UsageError: another form, or a shape that does not match the layout.
        """
        name, _, rest = text.partition(":")
        layout, _, sizes = rest.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size.isdecimal())
        if not name or not layout or len(shape) != len(layout):
            raise UsageError(f"{text}: expected NAME:LAYOUT:SHAPE with a size per letter, such as x:TBCHW:6x2x3x9x11")
        if "T" in layout[1:]:
            raise UsageError(f"{text}: expected the time axis T first")
        return cls(name, layout, shape)


def _array_entries(
    arrays: Mapping[str, NDArray[Any]], inputs: list[ArraySpec], states: list[ArraySpec]
) -> dict[str, Any]:
    layouts = {spec.name: spec.layout for spec in inputs}
    layouts |= {f"{kind}_{spec.name}": spec.layout for spec in states for kind in ("init", "final")}
    entries = {}
    for name, array in arrays.items():
        plain = name.removesuffix("_f64")
        layout = layouts.get(plain) or "T" + OUTPUT_LAYOUTS.get(array.ndim - 1, "BCHW"[: array.ndim - 1])
        role = (
            "initial state" if plain.startswith("init_") else "final state" if plain.startswith("final_") else "output"
        )
        role = "input" if plain in {spec.name for spec in inputs} else role
        suffix = " (computed in float64)" if name != plain else ""
        entries[name] = {"layout": layout, "shape": list(array.shape), "dtype": str(array.dtype), "role": role + suffix}
    return entries


def _reset(text: str) -> tuple[int, list[int]]:
    step, _, mask = text.partition(":")
    values = mask.split(",")
    if not step.isdecimal() or not set(values) <= {"0", "1"}:
        raise UsageError(f"--reset {text}: expected STEP:MASK, such as 3:1,0 (1 keeps the state of a row)")
    return int(step), [int(value) for value in values]


@click.command()
@click.argument("checkout", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("factory", metavar="PKG.MOD:NAME|FILE.py:NAME")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the case: .../FAMILY/CASE."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Argument of the factory; JSON or Python.")
@click.option(
    "--input", "inputs", multiple=True, required=True, metavar="NAME:LAYOUT:SHAPE", help="An input; T is time."
)
@click.option("--state", "states", multiple=True, required=True, metavar="NAME:LAYOUT:SHAPE", help="A state, B first.")
@click.option(
    "--step", metavar="FILE.py:NAME", help="Adapter that calls the model; by default y, *states = model(...)."
)
@click.option("--initial", type=click.Choice(["zeros", "random"]), default="zeros", show_default=True)
@click.option("--reset", "resets", multiple=True, metavar="STEP:MASK", help="Clear states before a step, as 3:1,0.")
@click.option("--seed", default=0, show_default=True)
@click.option("--licence", required=True, help="SPDX identifier of upstream's licence.")
@click.option("--repository", help="Address of the repository, if CHECKOUT is no git checkout.")
@click.option("--commit", help="Commit, if CHECKOUT is no git checkout.")
@click.option("--patch", "patches", multiple=True, help="Describes a change to upstream's code or to its surroundings.")
@click.option("--note", "notes", multiple=True)
def main(
    checkout: Path,
    factory: str,
    output: Path,
    settings: Sequence[str],
    inputs: Sequence[str],
    states: Sequence[str],
    step: str | None,
    initial: str,
    resets: Sequence[str],
    seed: int,
    licence: str,
    repository: str | None,
    commit: str | None,
    patches: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Record a golden case of the module that FACTORY in CHECKOUT makes."""
    try:
        checkout, constructor = checkout.resolve(), parse_settings(settings)
        input_specs, state_specs = [list(map(ArraySpec.parse, texts)) for texts in (inputs, states)]
        events = dict(map(_reset, resets))
        generator = torch.Generator().manual_seed(seed)

        def uniform(shape: Sequence[int]) -> Tensor:
            return 1.6 * torch.rand(shape, generator=generator) - 0.8

        with importable(checkout):
            torch.manual_seed(seed)
            model = named_object(factory, "FACTORY")(**constructor).float().eval()
            randomise(model, generator)
            run = Run(
                inputs={spec.name: torch.randn(spec.shape, generator=generator) for spec in input_specs},
                moving=frozenset(spec.name for spec in input_specs if spec.layout.startswith("T")),
                initial={
                    s.name: uniform(s.shape) if initial == "random" else torch.zeros(s.shape) for s in state_specs
                },
                resets=events,
            )
            if not run.moving:
                raise UsageError("--input: at least one input needs a leading time axis T")
            arrays, measured = record(model, run, function_of_file(step) if step else call_in_order)
            upstream = provenance(checkout, repository, commit, patched=bool(patches))
        case = {
            "schema": 1,
            "system": output.resolve().parent.name,
            "case": output.name,
            "upstream": {**upstream, "classes": factory.rpartition(":")[2], "license": licence},
            "runtime": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "device": "cpu",
                "mode": "eval, no_grad",
            },
            "patches": list(patches),
            "constructor": constructor,
            "run_options": {},
            "seed": seed,
            "how_called": f"one step per call: {Path(step.rpartition(':')[0]).read_text()}"
            if step
            else call_in_order.__doc__,
            "events": [{"type": "reset", "before_step": at, "mask": mask} for at, mask in sorted(events.items())],
            "arrays": _array_entries(arrays, input_specs, state_specs),
            "initial_state": initial,
            "state_dict": {
                name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
                for name, t in model.state_dict().items()
            },
            **measured,
            "notes": list(notes),
        }
        output.mkdir(parents=True, exist_ok=True)
        torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, output / "checkpoint.pth")
        np.savez_compressed(output / "io.npz", **arrays)  # type: ignore[arg-type]  # numpy types every keyword as allow_pickle
        (output / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    except StepcellError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {run.steps} steps, tolerance {case['suggested_atol_float32']:.1e}")
    for name in measured["unused_tensors"]:
        click.echo(f"warning: tensor {name} has no effect on the outputs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
