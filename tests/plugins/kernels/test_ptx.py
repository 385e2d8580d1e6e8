"""Compiled kernels without a GPU: their PTX runs in tools/ptx_emulator, launched through the real launcher.

Some tests damage the PTX on purpose, to show that the emulator notices.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from stepcell.plugins.kernels import compile as compiling
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import compile_kernel, compile_ptx
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.signature import constants, kernel_inputs, kernel_outputs, kernels_of
from stepcell.plugins.kernels.tiles import Tile, tiles
from stepcell.plugins.tensorrt.portable import portable_kernels
from stepcell.plugins.tensorrt.step import CellStep, workspace_size
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of
from tools.kernel_steps import POISON, TOLERANCE, half_map, random_weights, reference_step
from tools.ptx_emulator.driver import EmulatedDriver
from tools.ptx_emulator.launch import CAPABILITIES, Edit, Emulated
from tools.ptx_emulator.program import Fault, parse

CELLS = [
    "gru_x16_h16_k3x3_soft_float32",
    "gru_x3_h5_k3x3_soft_float32",  # padding channels
    "gru_x64_h64_k1x1_soft_float16",  # a block of the loop lies within one tap
    "gru-after_x3_h12_k1x5_hard_float16",
    "lstm-map_x8_h24_k3x3_soft_float32_pre",
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Emulated]:
    def make(capability: str) -> Emulated:
        driver = EmulatedDriver()
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        return Emulated(capability, driver)

    return make


def chosen(cell: CellConfig, capability: str, which: int) -> dict[str, Tile]:
    """The default tile of every kernel, or the last one, which is split where there is enough to split."""
    return {k: tiles(k, cell, capability, 300)[which] for k in kernels_of(cell, fp16_mirror=False)}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("label", CELLS)
def test_compiled_kernels_equal_the_reference(label: str, capability: str, steps: Any, emulated: Any) -> None:
    """With the default tile or the last one, in turns: `make kernels-emulate` runs them all."""
    cell = CellConfig.from_label(label)
    tile = chosen(cell, capability, -((CELLS.index(label) + CAPABILITIES.index(capability)) % 2))
    run = steps(cell, size=(1, 6, 11), tile=tile, fp16_mirror=False, launch=emulated(capability).launch)
    worst = run.run(4)
    names = ", ".join(f"{kernel} {t.label}" for kernel, t in tile.items())
    assert max(worst.values()) <= TOLERANCE[cell.state_dtype], f"{label} for {capability}: {names}: {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("label", ["gru_x3_h5_k3x3_soft_float32", "lstm-map_x8_h24_k3x3_soft_float32_pre"])
def test_gpus_that_are_not_emulated_run_the_text_of_one_that_is(label: str) -> None:
    cell = CellConfig.from_label(label)
    for alike in (("8.7", "8.0", "8.6", "8.9"), ("11.0", "10.0")):
        for kernel in kernels_of(cell, fp16_mirror=False):
            texts = [compile_ptx(kernel, cell, chosen(cell, each, -1)[kernel], each).text for each in alike]
            assert len({re.sub(r"(?m)^\.(version|target) .*$", "", text) for text in texts}) == 1, kernel


@pytest.mark.slow
def test_a_split_tile_does_not_depend_on_the_order_of_programs(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CellConfig.from_label("gru_x64_h64_k3x3_soft_float32")
    found = []
    for seed in range(3):
        driver = EmulatedDriver(seed)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        tile = chosen(cell, "8.7", -1)
        assert tile["gru_gates"].splits == tile["gru_candidate"].splits == 4
        device = Emulated("8.7", driver)
        found.append(steps(cell, size=(1, 5, 13), tile=tile, fp16_mirror=False, launch=device.launch).run(2))
    assert found[0] == found[1] == found[2]
    assert max(found[0].values()) < TOLERANCE["float32"], found[0]


def dropped(pattern: str, number: int) -> Edit:
    """Without the line that matches for the n-th time."""

    def edit(text: str) -> str:
        lines = text.splitlines()
        found = [i for i, line in enumerate(lines) if re.match(rf"\s*{pattern}", line)]
        lines[found[number]] = ""
        return "\n".join(lines)

    return edit


def changed(pattern: str, replacement: str) -> Edit:
    """With the first match replaced."""

    def edit(text: str) -> str:
        result, count = re.subn(pattern, replacement, text, count=1)
        assert count == 1, pattern
        return result

    return edit


FLIGHT = "to which a copy is in flight"
BARRIER = "with no barrier"
BEHIND = changed(r"(cp\.async\.wait_group\s+[1-9];\s*)bar\.sync\s+0;", r"\g<1>")
MMA = r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)"
DAMAGE = {
    "8.7 loop: copies not waited for": ("8.7", "gru_gates", 0, dropped(r"cp\.async\.wait_group", 0), FLIGHT),
    "8.7 loop: one copy less waited for": ("8.7", "gru_gates", 0, changed(r"wait_group 	4", "wait_group 5"), FLIGHT),
    "8.7 loop: a group not closed": ("8.7", "gru_gates", 0, dropped(r"cp\.async\.commit_group", 3), FLIGHT),
    "8.7 loop: no barrier behind the copies": ("8.7", "gru_gates", 0, BEHIND, BARRIER),
    "8.7 loop: no barrier before new copies": ("8.7", "gru_gates", 0, dropped(r"bar\.sync", 3), BARRIER),
    "8.7 epilogue: no barrier": ("8.7", "gru_gates", 0, dropped(r"bar\.sync", -1), BARRIER),
    "8.7 another row of the left operand": ("8.7", "gru_gates", 0, changed(MMA, r"\g<1>\g<3>, \g<2>"), ""),
    "8.7 beyond a buffer": (
        *("8.7", "gru_gates", 0),
        changed(r"(st\.global\S+ \[ %rd\d+ \+ )0 ]", rf"\g<1>{1 << 40} ]"),
        "which has",
    ),
    "8.7 not aligned": (
        "8.7",
        "gru_gates",
        0,
        changed(r"(st\.global\.v4\S+ \[ %rd\d+ \+ )0 ]", r"\g<1>4 ]"),
        "multiple",
    ),
    "8.7 split: counted before all have written": (
        *("8.7", "gru_candidate", -1),
        lambda text: re.sub(r"bar\.sync\s+0;((?:(?!bar\.sync)[\s\S])*atom\.global)", r"\g<1>", text, count=1),
        "releases stores of other warps",
    ),
    "9.0 products not waited for": ("9.0", "gru_gates", 0, dropped(r"wgmma\.wait_group", -1), "in the background"),
    "9.0 loop: one product less waited for": (
        *("9.0", "gru_gates", 0),
        changed(r"wgmma\.wait_group\.sync\.aligned 1", "wgmma.wait_group.sync.aligned 2"),
        "a tensor core is reading",
    ),
    "9.0 loop: no barrier behind the copies": ("9.0", "gru_gates", 0, BEHIND, BARRIER),
    "9.0 loop: no barrier behind the products": ("9.0", "gru_gates", 0, dropped(r"bar\.sync", 3), BARRIER),
    "9.0 another swizzle": ("9.0", "gru_gates", 0, changed("4611686293305294848", "-9223371761976868864"), ""),
    "11.0 loop: no barrier behind the copies": ("11.0", "gru_gates", 0, BEHIND, BARRIER),
    "11.0 products not waited for": (
        *("11.0", "gru_gates", 0),
        lambda text: re.sub(r"mbarrier\.try_wait[^;]*;\s*@!complete[^;]*;", "", text),
        "in the background|in flight|is taken away|is reading",
    ),
    "11.0 a store not waited for": ("11.0", "gru_gates", 0, dropped(r"tcgen05\.wait::st", 0), "wait and barrier"),
    "11.0 a load not waited for": ("11.0", "gru_gates", 0, dropped(r"tcgen05\.wait::ld", 0), "in the background"),
    "11.0 nobody told": ("11.0", "gru_gates", 0, dropped(r"@%p\d+ tcgen05\.commit", 0), "nothing will come to"),
    "12.0 no barrier before a matrix is read back": ("12.0", "gru_gates", 0, dropped(r"bar\.sync", -1), BARRIER),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str, steps: Any, emulated: Any) -> None:
    capability, kernel, which, edit, reason = DAMAGE[name]
    cell = CellConfig.from_label("gru_x64_h64_k3x3_soft_float32")
    device, tile = emulated(capability), chosen(cell, capability, which)
    for other in kernels_of(cell, fp16_mirror=False):
        device.edit = edit if other == kernel else None
        device.launcher(other, cell, tile[other])
    run = steps(cell, size=(1, 3, 7), tile=tile, fp16_mirror=False, launch=device.launch)
    if reason:
        with pytest.raises(Fault, match=reason):
            run.run(1)
    else:  # no rule is broken, but the result is
        worst = run.run(1)
        assert not max(worst.values()) < 10 * TOLERANCE["float32"], worst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", "writes %r.*, which a product in the background still reads"),
        ("11.0", "writes tensor memory that a product in the background uses"),
    ],
)
def test_the_compiler_still_overwrites_what_tensor_cores_read(
    capability: str, reason: str, steps: Any, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why some loops whose tiles go through registers are not pipelined (conv.py); if this fails, they can be."""
    monkeypatch.setattr(compiling, "constants", lambda *given: constants(*given[:3]))
    cell = CellConfig.from_label("gru-after_x3_h12_k1x5_hard_float16")
    run = steps(cell, size=(1, 6, 11), tile=chosen(cell, capability, 0), launch=emulated(capability).launch)
    with pytest.raises(Fault, match=reason):
        run.run(1)


OVERLAPPING = [("64x16x32s4w4p", "64x16x32s4w4p"), ("64x16x32s4w4k2p", "64x16x32s4w4k2p")]


def overlapping_steps(driver: EmulatedDriver, tiles: tuple[str, str], edit: Edit, count: int) -> float:
    """Worst difference to float64 of steps as the plugin queues them: the candidate is launched on top of the gates."""
    cell, size = CellConfig.from_label("gru_x16_h16_k3x3_soft_float32"), (1, 6, 11)
    images = []
    for kernel, label in zip(("gru_gates", "gru_candidate"), tiles, strict=True):
        tile = Tile.from_label(label)
        images.append(compile_kernel(kernel, cell, tile, "9.0"))
        driver.learn(images[-1], parse(edit(compile_ptx(kernel, cell, tile, "9.0").text)))
    step = CellStep(cell, images, 0, fp16_mirror=True)
    step.resize(*size)
    scratch = torch.empty(workspace_size(cell, images, 66, fp16_mirror=True) + 256, dtype=torch.uint8)
    weights = random_weights(cell, size[1:], seed=3)
    given = {name: torch.from_numpy(array) for name, array in pack(cell, weights).items()}
    exact = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    state = (torch.randn(1, 16, 6, 11, generator=torch.Generator().manual_seed(0)) * 0.5).half()
    expected, worst = {"h": state.double()}, 0.0
    given |= {"state": state.float().contiguous(), "h": half_map(state)}
    for number in range(count):
        x = torch.randn(1, 16, 6, 11, generator=torch.Generator().manual_seed(number + 1)).half()
        given["x"] = half_map(x)
        made = {"state_out": torch.full_like(given["state"], POISON), "y": torch.full_like(given["h"], POISON)}
        scratch.fill_(255)  # NaN
        inputs, outputs = (
            [driver.know(t.buffer, buffers[t.buffer]) for t in tensors]
            for buffers, tensors in ((given, inputs_of(cell, fp16_mirror=True)), (made, outputs_of(cell)))
        )
        start = driver.know("scratch", scratch, shared=True) + 255 & ~255
        step.run(inputs, outputs, start, 7)
        driver.finish()
        expected = reference_step(cell, exact, x.double(), expected)
        worst = max(worst, float((made["state_out"].double() - expected["h"]).abs().nan_to_num(torch.inf).max()))
        given |= {"state": made["state_out"], "h": made["y"]}
    step.close()
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("tiles", OVERLAPPING, ids=" ".join)
def test_launches_that_overlap(tiles: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate runs as far as it may before the gates have begun: nothing could be overlapped more."""
    driver = EmulatedDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    worst = overlapping_steps(driver, tiles, lambda text: text, 8)
    assert worst < TOLERANCE["float32"], f"worst difference over 8 steps {worst:.2e}"
    assert driver.overlapped == 8
    worst = overlapping_steps(driver, tiles, lambda text: text.replace("griddepcontrol.wait", "// no wait"), 1)
    assert not worst < 1, worst


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.7", "11.0"])
@pytest.mark.parametrize("label", ["gru_x3_h12_k3x3_soft_float32", "lstm-channel_x16_h16_k3x3_soft_float32"])
def test_the_portable_form(label: str, capability: str, steps: Any) -> None:
    """Launched as TensorRT does it: inputs, H, W, P, outputs, and no other memory."""
    cell, driver = CellConfig.from_label(label), EmulatedDriver()
    kernels = {k: portable_kernels(k, cell, capability, 300)[0] for k in kernels_of(cell, fp16_mirror=False)}
    functions = {kernel: driver.load(parse(portable.ptx)) for kernel, portable in kernels.items()}

    def launch(
        kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: tuple[int, int, int]
    ) -> None:
        portable, numbers = kernels[kernel], (size[1], size[2], size[0] * size[1] * size[2])
        inputs, outputs = (
            [driver.know(p.name, buffers[p.buffer]) for p in parameters]
            for parameters in (kernel_inputs(kernel, cell), kernel_outputs(kernel))
        )
        values: list[Any] = [*map(ctypes.c_uint64, inputs), *map(ctypes.c_int32, numbers)]
        values += map(ctypes.c_uint64, outputs)
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid = (-(-numbers[2] // portable.grid_pixels), portable.grid_channels, 1)
        block = (portable.threads, 1, 1, portable.shared_bytes, 0)
        driver.cuLaunchKernel(functions[kernel], *grid, *block, ctypes.addressof(places), 0)
        driver.finish()

    tile = chosen(cell, capability, 0)  # of no meaning here
    worst = steps(cell, size=(2, 3, 7), tile=tile, fp16_mirror=False, launch=launch).run(4)
    assert max(worst.values()) <= TOLERANCE[cell.state_dtype], worst
