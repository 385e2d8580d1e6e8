"""Kernels compiled without a GPU, inspected with NVIDIA's cuobjdump."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from stepcell.errors import InputError, UsageError
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import CAPABILITIES
from stepcell.plugins.kernels.image import KernelImage, read_image
from stepcell.plugins.kernels.signature import PARAMETERS, constants
from stepcell.plugins.kernels.store import images_for, wanted
from stepcell.plugins.kernels.tiles import Tile
from stepcell.plugins.kernels.triton import gru, lstm, narrow
from stepcell.plugins.kernels.typical import TYPICAL
from tools.kernels_report import REPORT, table

CELLS = ["gru_x3_h6_k3x3_soft_float32", "lstm_x6_h4_k1x5_soft_float32"]  # of the model `stack_onnx`
HARD = "gru-after_x64_h32_k1x3_hard_float16"


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def compile_cells(folder: Path, capabilities: str, *cells: str | Path, **variables: str) -> Any:
    command = ("-m", "stepcell", "kernels", "compile", "--compute-capability", capabilities, "--json")
    return python(*command, "-o", folder, *cells, **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stack_onnx: Path) -> Path:
    """All kernels of a model's cells for one GPU, and of one more cell for two."""
    folder = tmp_path_factory.mktemp("kernels") / "made by the command"
    for capabilities, cells in (("8.7", [stack_onnx]), ("8.7,9.0", ["--cell", HARD])):
        found = compile_cells(folder, capabilities, *cells, TRITON_CACHE_DIR=str(folder.parent / "triton"))
        assert found.returncode == 0, found.stderr
        kernels = json.loads(found.stdout)["kernels"]
        assert len(kernels) == found.stderr.count(" registers ")
        assert {k["key"] for k in kernels} <= {path.stem for path in folder.iterdir()}
    return folder


def dump(cubin: Path, option: str) -> str:
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def images(folder: Path) -> list[KernelImage]:
    return [read_image(path) for path in sorted(folder.glob("*.json"))]


@pytest.mark.slow
def test_arguments_lie_where_the_code_expects_them(folder: Path) -> None:
    assert {(image.info.kernel, image.info.cell, image.info.capability) for image in images(folder)} == {
        ("narrow_state", "h6", "8.7"),
        ("gru_gates", CELLS[0], "8.7"),
        ("gru_candidate", CELLS[0], "8.7"),
        ("narrow_state", "h4", "8.7"),
        ("lstm_step", CELLS[1], "8.7"),
        ("gru_after", HARD, "8.7"),
        ("gru_after", HARD, "9.0"),
    }
    for image in images(folder):
        path = folder / f"{image.info.key}.cubin"
        text = dump(path, "--dump-elf")
        pattern = r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)"
        expected = sorted(tuple(int(word, 16) for word in found) for found in re.findall(pattern, text))
        given = [(i, argument.offset, argument.size) for i, argument in enumerate(image.info.arguments)]
        assert given == expected, path


@pytest.mark.slow
def test_the_code_is_that_of_its_gpu_and_uses_tensor_cores(folder: Path) -> None:
    for image in images(folder):
        machine = int.from_bytes(image.cubin[48:52], "little")  # e_flags of the ELF header
        sm = int(image.info.capability.replace(".", ""))
        assert sm in (machine & 0xFF, machine >> 8 & 0xFF), hex(machine)
        assert image.info.spill_instructions == 0, image.info
        assert (image.info.tensor_core_instructions > 0) == (image.info.kernel != "narrow_state"), image.info
        assert b"/" + b"plugins" not in image.cubin  # no paths of the machine that compiled
        if "_hard_" in image.info.cell:  # a clamp that keeps a NaN; the interpreter knows no other
            code = dump(folder / f"{image.info.key}.cubin", "--dump-sass")
            assert "FMNMX.NAN" in code
            assert not re.search(r"FMNMX(?!\.NAN)", code)


@pytest.mark.slow
def test_what_is_there_is_not_compiled_again_and_needs_no_triton(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    missing = "raise ModuleNotFoundError('no triton here', name='triton')"
    (tmp_path / "triton" / "__init__.py").write_text(missing)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cells = [word for label in (*CELLS, HARD) for word in ("--cell", label)]
    found = compile_cells(folder, "8.7", *cells, PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    found = compile_cells(folder, "8.7", "--cell", "gru_x1_h1_k1x1_soft_float32", PYTHONPATH=str(tmp_path))
    assert found.returncode == 5, found.stderr
    assert "Triton, which compiles it, is not installed" in found.stderr
    assert "stepcell kernels compile --compute-capability 8.7 --cell gru_x1_h1_k1x1_soft_float32" in found.stderr


PTX = """
import sys
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import compile_ptx
from stepcell.plugins.kernels.tiles import Tile

kernel, cell, tile, capability = sys.argv[1:]
print(compile_ptx(kernel, CellConfig.from_label(cell), Tile.from_label(tile), capability).text)
"""


def ptx_of(kernel: str, cell: str, tile: str, capability: str) -> list[str]:
    found = python("-c", PTX, kernel, cell, tile, capability)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def accesses(kernel: str, lines: list[str]) -> list[tuple[int, str, set[str]]]:
    """Every access to global memory: its line, its text, and the parameters that its address comes from."""
    names = [parameter.name for parameter in PARAMETERS[kernel]]
    origins: dict[str, set[str]] = {}
    steps = []
    for number, line in enumerate(lines):
        if re.search(r"\b(?:ld|st|atom|red|prefetch)\.global|cp\.async\.c[ag]\.shared\.global", line):
            address = re.findall(r"\[([^\]]*)\]", line)[-1]
            steps.append((number, line, re.findall(r"%\w+", address)))
    while True:  # until no register learns of another parameter
        before = sum(map(len, origins.values()))
        for line in lines:
            registers = re.findall(r"%\w+", line)
            if not registers or re.search(r"\b(?:ld|st|atom|wgmma|mma|cp)\.(?!param)", line):
                continue
            found = {names[int(i)] for i in re.findall(rf"{kernel}_param_(\d+)\b", line) if int(i) < len(names)}
            for register in registers[1:]:
                found |= origins.get(register, set())
            origins.setdefault(registers[0], set()).update(found - {"H", "W", "P"})
        if sum(map(len, origins.values())) == before:
            break
    return [(n, line, set().union(*(origins.get(r, set()) for r in registers))) for n, line, registers in steps]


@pytest.mark.slow
@pytest.mark.parametrize("tile", ["64x64x64s4w4p", "64x64x64s4w4k4p"])
def test_the_candidate_waits_before_it_touches_what_the_gates_write(tile: str) -> None:
    lines = ptx_of("gru_candidate", "gru_x64_h64_k3x3_soft_float32", tile, "9.0")
    (wait,) = (number for number, line in enumerate(lines) if "griddepcontrol.wait" in line)
    assert not any("griddepcontrol.launch_dependents" in line for line in lines)
    found = accesses("gru_candidate", lines)
    early, late = (set().union(*(names for n, _, names in found if (n > wait) == after)) for after in (False, True))
    assert early == {"x", "wx"}, early
    split = {"partials", "arrivals"} if "k" in tile else set()
    assert late == {"rh", "wh", "bias", "z", "state", "state_out", "y_out"} | split, late
    products = [n for n, line in enumerate(lines) if "wgmma.mma_async" in line]
    assert min(products) < wait < max(products)


@pytest.mark.slow
def test_the_gates_let_the_candidate_start_and_wait_for_nothing() -> None:
    lines = ptx_of("gru_gates", "gru_x64_h64_k3x3_soft_float32", "64x32x64s4w4p", "9.0")
    assert sum("griddepcontrol.launch_dependents" in line for line in lines) == 1
    assert not any("griddepcontrol.wait" in line for line in lines)


@pytest.mark.slow
def test_only_the_candidate_is_launched_early(tmp_path: Path) -> None:
    cell = "gru_x8_h8_k1x1_soft_float16"
    assert compile_cells(tmp_path, "9.0", "--cell", cell).returncode == 0
    overlaps = {(image.info.kernel, image.info.tile[-1] == "p", image.info.overlaps) for image in images(tmp_path)}
    assert overlaps == {
        ("gru_gates", True, False),
        ("gru_candidate", False, False),
        ("gru_candidate", True, True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.7", "9.0", "10.0"])
def test_partial_sums_are_written_before_they_are_counted_and_read_after(capability: str) -> None:
    lines = ptx_of("gru_gates", "gru_x64_h64_k3x3_soft_float32", "64x32x64s4w4k4", capability)
    found = [(n, line, names) for n, line, names in accesses("gru_gates", lines) if names & {"partials", "arrivals"}]
    stores, loads = ([n for n, line, _ in found if word in line] for word in ("st.global.v", "ld.global"))
    (count,) = (n for n, line, _ in found if "atom.global.gpu.acq_rel.add" in line)
    barriers = [number for number, line in enumerate(lines) if "bar.sync" in line]
    assert any(max(stores) < n < count for n in barriers), (stores, barriers, count)
    assert any(count < n < min(loads) for n in barriers), (loads, barriers, count)


@pytest.mark.slow
def test_a_damaged_or_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    image = images(folder)[0]
    name = image.info.key
    for change, message in [
        (lambda cubin, text: (cubin[:-1] + bytes([cubin[-1] ^ 1]), text), "is not the code"),
        (lambda cubin, text: (cubin, text.replace('"warps": 4', '"warps": "4"')), "no kernel description"),
        (lambda cubin, text: (cubin, text.replace('"schema": 2', '"schema": 3')), "schema 3, expected 2"),
        (lambda cubin, text: (cubin, text.replace('"warps": 4', '"warps": 8')), "does not match its checksum"),
        (lambda cubin, text: (cubin, text[:40]), "no kernel description"),
    ]:
        cubin, text = change(image.cubin, (folder / f"{name}.json").read_text())
        (tmp_path / f"{name}.cubin").write_bytes(cubin)
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / f"{name}.json")
        assert caught.value.hint


@pytest.mark.slow
def test_the_report_holds_and_no_default_tile_spills() -> None:
    # Triton's cache is keyed by source, options and version, so a cached kernel equals a compiled one.
    found = python("-m", "tools.kernels_report", "--check")
    assert found.returncode == 0, found.stderr


def test_the_committed_report_is_whole_and_shown() -> None:
    kernels = json.loads(REPORT.read_text())["kernels"]
    for cell, pixels in TYPICAL:
        for capability in CAPABILITIES:
            for kernel, tile in wanted(cell, capability, pixels):
                name = f"{cell.label} {kernel} {tile.label}"
                _, shared, tensor_cores, spills, _ = kernels[name][capability]
                assert spills == 0, (name, capability)
                assert (tensor_cores > 0) == (kernel != "narrow_state"), (name, capability)
                assert shared <= 99 * 1024, (name, capability)  # the least that any of these GPUs has
    document = (Path(__file__).parents[3] / "docs" / "plugin.md").read_text()
    assert table(json.loads(REPORT.read_text())) in document, "run make kernels-report"


def test_turing_and_unknown_gpus_are_refused(tmp_path: Path) -> None:
    cell = CellConfig.from_label(CELLS[0])
    with pytest.raises(UsageError, match=r"7\.5: Triton emits no tensor-core") as caught:
        next(images_for(cell, "7.5", tmp_path))
    assert "--plugin off" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"expected one of 8\.0, .*12\.0, got '9'"):
        next(images_for(cell, "9", tmp_path))


@pytest.mark.parametrize(
    "label", ["", "gru", "gru_x1_h1_k2x1_soft_float32", "gru_x0_h1_k1x1_soft_float32", "gru_x1_h0_k1x1_soft_float32"]
)
def test_a_label_that_is_no_cell_is_refused(label: str) -> None:
    with pytest.raises(UsageError, match="kernel cell"):
        CellConfig.from_label(label)


def test_labels_are_read_back() -> None:
    for label in (*CELLS, HARD, "lstm_x0_h7_k7x5_hard_float16_pre"):
        assert CellConfig.from_label(label).label == label
    for tile in (Tile(64, 32, 16, 3), Tile(64, 32, 16, 3, splits=4), Tile(64, 32, 16, 3, splits=12, overlap=True)):
        assert Tile.from_label(tile.label) == tile
    labels = [tile.label for tile in (Tile(8, 4, 2, 1), Tile(8, 4, 2, 1, splits=2, overlap=True))]
    assert labels == ["8x4x2s1w4", "8x4x2s1w4k2p"]
    for wrong in ("8x4x2s1w4p2", "8x4x2s1w4k", "8x4x2s1", ""):
        with pytest.raises(UsageError, match="tile: cannot read"):
            Tile.from_label(wrong)


def test_which_tiles_are_split_and_which_overlap() -> None:
    def labels(cell: str, capability: str, pixels: int | None) -> set[str]:
        """Kernels and tiles that are more than plain."""
        found = wanted(CellConfig.from_label(cell), capability, pixels)
        return {f"{kernel} {tile.label}" for kernel, tile in found if tile.splits > 1 or tile.overlap}

    few, cell = 20 * 15, "gru_x256_h256_k3x3_soft_float32"
    split = {"gru_gates 64x32x64s4w4k4", "gru_candidate 64x64x64s4w4k4"}
    assert labels(cell, "8.7", few) == split
    assert labels(cell, "8.7", 64 * 64) == labels(cell, "8.7", None) == set()
    assert labels("gru_x3_h5_k3x3_soft_float32", "8.7", few) == set()  # too short a loop to share
    on_hopper = labels(cell, "9.0", few)
    candidates = {label for label in on_hopper if label.startswith("gru_candidate")}
    assert candidates == {f"gru_candidate 64x64x64s4w4{more}" for more in ("k4", "p", "k4p")}
    gates = [tile for kernel, tile in wanted(CellConfig.from_label(cell), "9.0", few) if kernel == "gru_gates"]
    assert all(tile.overlap for tile in gates)
    assert labels("gru_x0_h64_k3x3_soft_float32_pre", "9.0", None) == {  # no x to start with
        f"gru_gates {tile}" for tile in ("128x32x64s3w4p", "64x32x64s4w4p", "128x32x32s3w4p")
    }
    assert labels("lstm_x64_h64_k3x3_soft_float32", "9.0", few) == {"lstm_step 64x32x32s3w4k4"}


def test_parameters_are_those_of_the_kernels() -> None:
    tile = Tile(16, 16, 16, 1)
    for kernel, parameters in PARAMETERS.items():
        cell = CellConfig.from_label(CELLS[1] if kernel == "lstm_step" else CELLS[0])
        function: Any = next(getattr(m, kernel) for m in (gru, lstm, narrow) if hasattr(m, kernel))
        assert [*(p.name for p in parameters), *constants(kernel, cell, tile)] == list(function.arg_names), kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_fits_the_kernels(capability: str) -> None:
    """Powers of two, at most the extra rows and columns that packing leaves, four warps."""
    labels = [
        f"{op}_x{x}_h{h}_k3x3_soft_float32_pre"
        for op in ("gru", "gru-after", "lstm")
        for x in (0, 3, 64)
        for h in (1, 20, 300)
    ]
    for cell, pixels in [
        *TYPICAL,
        *((CellConfig.from_label(label), pixels) for label in labels for pixels in (None, 1, 10**6)),
    ]:
        chosen = wanted(cell, capability, pixels)
        assert len(chosen) == len(set(chosen))
        for _, tile in chosen:
            for number in (tile.pixels, tile.channels, tile.depth):
                assert number & (number - 1) == 0, tile
            assert 16 <= tile.depth <= 64, tile
            assert tile.warps == 4, tile
            assert tile.channels * 4 <= 512, tile
