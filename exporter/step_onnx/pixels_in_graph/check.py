"""Check of a file that converts pixels in its graph against its float form, converted as `stepcell run` does."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import onnx

from stepcell.contract import Parity, StepContract, TensorSpec
from stepcell.dims import resolve
from stepcell.exporter.differences import difference
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import Array, Arrays, CheckClip, Step, differs, file_step
from stepcell.exporter.rounding import limit_of
from stepcell.exporter.step_onnx.graph import embed_contract
from stepcell.exporter.step_onnx.pixels_in_graph.convert import pixels_in_graph
from stepcell.exporter.step_onnx.pixels_in_graph.nodes import bytes_layout
from stepcell.nv12 import Nv12, nv12_of, nv12_to_rgb
from stepcell.pixels import PixelDType, as_chw, gain_and_offset
from stepcell.runtime.media.postprocess import crop, to_pixels
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.sample_frames import random_frame, smooth_frame

__all__ = ["STEPS", "float_form_step", "with_pixels_in_graph"]

STEPS = 8  # conversion has no memory; half of them random frames, half smooth ones
_SIZE = 32  # of a symbol of which the contract has no example
_SUBJECT = "the float form"


def with_pixels_in_graph(
    model: onnx.ModelProto, contract: StepContract, pixel_dtype: PixelDType = "uint8"
) -> tuple[onnx.ModelProto, StepContract]:
    """`pixels_in_graph` with its contract written into the file, compared with the float form over steps fed back.

    Args:
        model: a file with weights in memory and with its contract.
        contract: its contract.
        pixel_dtype: as of `pixels_in_graph`.

    Raises:
        UsageError, ExportError: as for `pixels_in_graph`.
        ParityError: a picture differs by more than one level, or a state by more than rounding.
    """
    changed, result = pixels_in_graph(model, contract, pixel_dtype)
    before = OnnxSession(model.SerializeToString(), "the file before the conversion of pixels")
    embed_contract(changed, result)
    after = OnnxSession(changed.SerializeToString(), "the file with the conversion of pixels")
    parity = _compare(
        float_form_step(file_step(before, contract), contract, result), file_step(after, result), contract, result
    )
    return changed, embed_contract(changed, msgspec.structs.replace(result, parity=parity))


def _compare(reference: Step, step: Step, contract: StepContract, result: StepContract) -> Parity | None:
    """The parity of the float form, with errors of pictures in levels.

    Both feed back their own states; each picture must agree to one level at every step.
    """
    less = {
        dim: 2 if nv12_of(after) else 1
        for before, after in zip(contract.inputs, result.inputs, strict=True)
        for letter, dim in zip(before.layout or "", before.shape, strict=False)
        if letter in "HW" and after.converts and after.converts.pad_multiple > 1
    }  # so that there is padding
    sizes = {symbol: result.example.get(symbol, _SIZE) - less.get(symbol, 0) for symbol in result.symbols}
    shapes = {spec.name: resolve(spec.shape, sizes) for spec in result.inputs} | result.state_shapes(sizes)
    states = {state.name: state.initial(shapes[state.name]).copy() for state in result.states}
    clip = CheckClip(f"frames of pixels, sizes {sizes}", STEPS, lambda: _frames(result, shapes), states)
    tolerance = limit_of(contract)
    pictures = [spec.name for spec in result.outputs if spec.converts]
    worst, share = dict.fromkeys(pictures, 0.0), dict.fromkeys(pictures, 0.0)
    wanted, given = dict(states), dict(states)
    for t, data in enumerate(clip):
        expected, got = reference(data, wanted), step(data, given)
        for name, truth in expected.items():
            found = difference(name, truth, got[name], tolerance, _SUBJECT, t)
            if name in pictures:
                if found.largest > 1:
                    raise differs(name, _SUBJECT, found, t, clip, None)
                worst[name] = max(worst[name], found.largest)
                share[name] = max(share[name], found.differing or 0.0)
            elif found.is_beyond:
                raise differs(name, _SUBJECT, found, t, clip, None)
        wanted, given = ({name: results[name] for name in states} for results in (expected, got))
    if contract.parity is None:
        return None

    def without_pictures(errors: dict[str, float]) -> dict[str, float]:
        return {name: error for name, error in errors.items() if name not in pictures}

    before = contract.parity
    return msgspec.structs.replace(
        before,
        reference=f"{before.reference}; pictures: the float form",
        max_abs_error={**before.max_abs_error, **worst},
        rms_error=without_pictures(before.rms_error),
        differing={**before.differing, **share},
        bound=None if before.bound is None else without_pictures(before.bound),
    )


def _frames(contract: StepContract, shapes: dict[str, tuple[int, ...]]) -> Iterator[Arrays]:
    rng = np.random.default_rng(0)
    for t in range(STEPS):
        yield {
            spec.name: random_frame(spec, shapes[spec.name], rng)
            if t < STEPS // 2
            else smooth_frame(spec, shapes[spec.name], t)
            for spec in contract.inputs
        }


def float_form_step(step: Step, contract: StepContract, converted: StepContract) -> Step:
    """A step of the float form that takes and returns what the converted file does; it converts on the host.

    Args:
        step: of floats, states by name.
        contract: of the float form.
        converted: of the file with the conversion in its graph.
    """
    inside = {spec.name: spec for spec in contract.inputs}
    outside = {spec.name: spec for spec in converted.inputs}

    def converted_step(data: Arrays, states: Arrays) -> Arrays:
        floats, frame = {}, None
        for name, array in data.items():
            floats[name] = array
            if outside[name].converts:
                how = nv12_of(outside[name])
                floats[name], found = (
                    _to_floats(inside[name], array) if how is None else _floats_of_nv12(inside[name], array, how)
                )
                frame = frame or found
        results = step(floats, states)
        for before, after in zip(contract.outputs, converted.outputs, strict=False):
            if before.layout and frame is not None and (after.converts or before.shape != after.shape):
                results[before.name] = crop(results[before.name], frame.size, frame.padded, before.layout)
            if after.converts:
                values = results[before.name]
                axes = tuple(axis for axis, letter in enumerate(str(before.layout)) if letter != "N")
                mean = next(spec.name for spec in converted.outputs if spec.name.startswith(f"{before.name}.mean"))
                results[mean] = values.mean(axes, dtype=np.float32)
                results[before.name] = _to_bytes(before, values)
        return results

    return converted_step


def _to_floats(spec: TensorSpec, array: Array) -> tuple[Array, Preprocessor]:
    """A batch of bytes as the float form takes it, and the preprocessor of its last row."""
    layout = str(spec.layout)
    rows, found = [], None
    channels = "C" in layout
    for row in array if "N" in layout else array[None]:
        pixels = row if channels else row[..., None]
        found = found or Preprocessor(spec, pixels)
        rows.append(found(pixels))
    assert found is not None
    if "N" not in layout:
        return rows[0], found
    return np.concatenate(rows, layout.index("N")), found


def _floats_of_nv12(spec: TensorSpec, array: Array, how: Nv12) -> tuple[Array, Preprocessor]:
    """The same of a batch of NV12."""
    layout, rgb = str(spec.layout), nv12_to_rgb(array, how)
    found = Preprocessor(spec, np.zeros(rgb.shape[-3:], np.uint8))
    gain, offset = (numbers.astype(np.float32).reshape(-1) for numbers in gain_and_offset(spec, 3))
    values = (rgb[..., ::-1] if spec.channels == "BGR" else rgb) * gain + offset
    ends = [(0, whole - size) for size, whole in zip(found.size, found.padded, strict=True)]
    values = np.pad(values, [(0, 0)] * (rgb.ndim - 3) + ends + [(0, 0)], mode="edge").astype(spec.dtype)
    return values.transpose([bytes_layout(layout).index(letter) for letter in layout]), found


def _to_bytes(spec: TensorSpec, values: Array) -> Array:
    layout = str(spec.layout)
    batch = values if "N" in layout else values[None]
    batch = np.moveaxis(batch, layout.index("N") if "N" in layout else 0, 0)
    rest = layout.replace("N", "")
    rows = [to_pixels(spec, as_chw(row, rest)) for row in batch]
    rows = rows if "C" in rest else [row[..., 0] for row in rows]
    return np.stack(rows) if "N" in layout else rows[0]
