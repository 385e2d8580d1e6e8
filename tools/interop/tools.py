"""What tools and runtimes of others do with a file: `python tools.py NAME FILE OUTPUT`, in an environment of its own.

An editor writes the file that it makes of FILE to OUTPUT. A runtime steps FILE over the frames and states of FILE.npz,
feeding back its own states, and writes the outputs of every step to OUTPUT (.npz).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner

Arrays = dict[str, np.ndarray]
Run = Callable[[list[np.ndarray]], list[np.ndarray]]  # outputs of a step from its inputs, both in the file's order


def onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnxslim.slim(str(source), str(target))


def graphsurgeon(source: Path, target: Path) -> None:
    import onnx_graphsurgeon as gs

    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(source)).cleanup().toposort()), target)


def polygraphy(source: Path, target: Path) -> None:
    command = [
        Path(sys.executable).parent / "polygraphy",
        "surgeon",
        "sanitize",
        source,
        "--fold-constants",
        "-o",
        target,
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def extract_model(source: Path, target: Path) -> None:
    graph = onnx.load(source).graph
    onnx.utils.extract_model(str(source), str(target), [i.name for i in graph.input], [o.name for o in graph.output])


def add_prefix(source: Path, target: Path) -> None:
    onnx.save(onnx.compose.add_prefix(onnx.load(source), "net/"), target)


def inline(source: Path, target: Path) -> None:
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(source)), target)


def to_opset_22(source: Path, target: Path) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), 22), target)


def to_opset_17(source: Path, target: Path) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), 17), target)


def float16_keeping_io(source: Path, target: Path) -> None:
    from onnxconverter_common.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def float16_whole(source: Path, target: Path) -> None:
    from onnxconverter_common.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source)), target)


def transformers_float16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic as quantize

    quantize(str(source), str(target))


def _optimised(source: Path, target: Path, level: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def ort_basic(source: Path, target: Path) -> None:
    _optimised(source, target, "ORT_ENABLE_BASIC")


def ort_all(source: Path, target: Path) -> None:
    _optimised(source, target, "ORT_ENABLE_ALL")


def openvino(path: Path) -> Run:
    import openvino

    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    order = [[p.get_any_name() for p in model.inputs].index(i.name) for i in onnx.load(path).graph.input]
    names = [o.name for o in onnx.load(path).graph.output]

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        results = model(dict(zip(order, arrays, strict=True)))
        return [np.array(results[model.output(name)]) for name in names]

    return run


def tract(path: Path) -> Run:
    import tract

    model = tract.onnx().load(str(path)).into_model().into_runnable()
    return lambda arrays: [result.to_numpy() for result in model.run(arrays)]


def ncnn(path: Path) -> Run:
    import ncnn

    graph = onnx.load(path).graph
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input]
    if any(0 in shape for shape in shapes):
        raise ValueError("pnnx needs fixed sizes")
    folder = path.with_suffix(".pnnx")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = folder / "model.onnx"  # pnnx writes beside its input
    shutil.copy(path, copy)
    sizes = ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes)
    found = subprocess.run(
        [Path(sys.executable).parent / "pnnx", copy, f"inputshape={sizes}"], capture_output=True, text=True
    )
    if found.returncode:
        raise RuntimeError(f"pnnx ended with code {found.returncode}")
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    if net.load_param(str(folder / "model.ncnn.param")) or net.load_model(str(folder / "model.ncnn.bin")):
        raise RuntimeError("ncnn does not load what pnnx wrote")

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        with net.create_extractor() as extractor:
            for index, array in enumerate(arrays):
                extractor.input(f"in{index}", ncnn.Mat(array[0]).clone())
            return [np.array(extractor.extract(f"out{index}")[1])[None] for index in range(len(graph.output))]

    return run


def iree(path: Path) -> Run:
    import iree.compiler.tools as compiler
    from iree import runtime

    mlir, vmfb = path.with_suffix(".mlir"), path.with_suffix(".vmfb")
    subprocess.run(
        [sys.executable, "-m", "iree.compiler.tools.import_onnx", path, "-o", mlir], check=True, capture_output=True
    )
    compiler.compile_file(
        str(mlir), input_type="onnx", target_backends=["llvm-cpu"], output_file=str(vmfb),
        extra_args=["--iree-llvmcpu-target-cpu=generic"],
    )  # fmt: skip
    module = runtime.load_vm_flatbuffer_file(str(vmfb), driver="local-sync")
    name = onnx.load(path).graph.name

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        results = getattr(module, name)(*arrays)
        return [np.array(each.to_host()) for each in (results if isinstance(results, tuple) else (results,))]

    return run


EDITORS = {
    each.__name__: each
    for each in (
        onnxsim, onnxslim, graphsurgeon, polygraphy, extract_model, add_prefix, inline, to_opset_22, to_opset_17,
        float16_keeping_io, float16_whole, transformers_float16, quantize_dynamic, ort_basic, ort_all,
    )
}  # fmt: skip
RUNTIMES: dict[str, Callable[[Path], Run]] = {"openvino": openvino, "tract": tract, "ncnn": ncnn, "iree": iree}


def step_all(run: Run, frames: np.ndarray, states: list[np.ndarray]) -> Arrays:
    """Every output of every step: data outputs first, then states, as the file has them."""
    results = []
    for frame in frames:
        outputs = run([frame, *states])
        states = outputs[len(outputs) - len(states) :]
        results.append(outputs)
    return {f"output{index}": np.stack([step[index] for step in results]) for index in range(len(results[0]))}


if __name__ == "__main__":
    tool, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if tool in EDITORS:
        EDITORS[tool](source, target)
    else:
        given = np.load(f"{source}.npz")
        states = [given[name] for name in given.files if name != "frames"]
        np.savez(target, **step_all(RUNTIMES[tool](source), given["frames"], states))  # type: ignore[arg-type]
