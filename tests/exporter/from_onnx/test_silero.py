"""A file with trained weights: silero-vad's voice activity detector, as its package ships it.

Stepped by StepLoop over real speech, it must say what the package's own wrapper says. The wrapper
puts the last 64 samples of a chunk in front of the next; that is data, so the test does it too.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.exporter.from_onnx.fuse import FuseReport, fuse
from stepcell.exporter.from_onnx.onnx_file import read_onnx_file
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.sizes import find_sizes
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions

silero_vad = pytest.importorskip("silero_vad", reason="the package silero-vad is not installed")

SPEECH = Path(__file__).parents[2] / "data" / "speech" / "beckett.mp3"
RATE, CHUNK, CONTEXT = 16000, 512, 64


@pytest.fixture(scope="module")
def speech() -> NDArray[np.float32]:
    """Chunks of one person's speech, [chunk, sample] in -1 to 1."""
    with av.open(str(SPEECH)) as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
    samples = np.concatenate(frames, axis=1)[0].astype(np.float32)
    return samples[: len(samples) // CHUNK * CHUNK].reshape(-1, CHUNK)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[FuseReport, Path]:
    with resources.as_file(resources.files("silero_vad.data") / "silero_vad.onnx") as source:
        target = tmp_path_factory.mktemp("silero") / "vad.onnx"
        return fuse(source, target), target


def test_contract(fused: tuple[FuseReport, Path]) -> None:
    contract = fused[0].contract
    (state,) = contract.states
    assert (state.name, state.original_input, state.original_output) == ("state", "state", "stateN")
    assert (state.shape, state.batch_axis) == ((2, "batch", 128), 1)
    assert [(spec.name, spec.dtype, len(spec.shape)) for spec in contract.inputs] == [
        ("input", "float32", 2),
        ("sr", "int64", 0),
    ]
    assert contract.parity is not None
    assert max(contract.parity.max_abs_error.values()) == 0


def test_it_is_compared_at_the_rate_that_its_graph_knows() -> None:
    with resources.as_file(resources.files("silero_vad.data") / "silero_vad.onnx") as source:
        file = read_onnx_file(source)
    samples = find_sizes(file, OnnxSession(file.data, "vad"), [Pair("state", "stateN", "state")], {}).samples
    assert all(RATE in {int(scalars["sr"]) for scalars in sample.scalars} for sample in samples[:2])


def test_speech_probability_equals_the_packages_own(
    fused: tuple[FuseReport, Path], speech: NDArray[np.float32]
) -> None:
    theirs = silero_vad.load_silero_vad(onnx=True)
    probabilities: list[tuple[float, float]] = []
    with StepLoop.open(fused[1]) as loop:
        for clip in (speech, speech[100:]):  # the second after a reset, in the middle of a word
            theirs.reset_states()
            loop.reset()
            context = np.zeros(CONTEXT, np.float32)
            for chunk in clip:
                expected = theirs(torch.from_numpy(chunk), RATE)
                step = loop.step(input=np.concatenate([context, chunk])[None], sr=np.int64(RATE))
                context = chunk[-CONTEXT:]
                probabilities.append((float(expected), float(step["output"][0, 0])))
    expected, got = np.array(probabilities).T
    assert len(got) > 500
    assert (got > 0.9).sum() > 100, "no speech was heard"
    assert (got < 0.1).sum() > 100, "no pause was heard"
    assert np.abs(got - expected).max() <= 1e-6


def test_two_streams_of_which_one_is_reset(fused: tuple[FuseReport, Path], speech: NDArray[np.float32]) -> None:
    def run(clip: NDArray[np.float32], forget: list[bool] | None) -> NDArray[Any]:
        results = []
        with StepLoop.open(fused[1]) as loop:
            for t, chunks in enumerate(clip):
                if t == 50 and forget is not None:
                    loop.reset(slots=forget)
                results.append(loop.step(input=chunks, sr=np.int64(RATE))["output"][:, 0])
        return np.array(results)

    windows = np.lib.stride_tricks.sliding_window_view(speech.ravel(), CONTEXT + CHUNK)[::CHUNK]
    both = np.stack([windows[:80], windows[100:180]], axis=1)
    got = run(both, [False, True])
    kept = run(both[:, :1], None)[:, 0]
    fresh = run(both[50:, 1:], None)[:, 0]
    assert np.abs(got[:, 0] - kept).max() <= 1e-6
    assert np.abs(got[50:, 1] - fresh).max() <= 1e-6
    assert np.abs(run(both, None)[50:, 1] - fresh).max() > 1e-3, "the reset made no difference"


@pytest.mark.parametrize(
    ("name", "shape"), [("silero_vad_16k_op15", (2, "batch", 128)), ("silero_vad_half", (2, "batch", 128))]
)
def test_its_other_files(name: str, shape: tuple[int | str, ...], tmp_path: Path) -> None:
    with resources.as_file(resources.files("silero_vad.data") / f"{name}.onnx") as source:
        report = fuse(source, tmp_path / "vad.onnx")
    assert [state.shape for state in report.contract.states] == [shape]


# TensorRT-RTX 1.7.1 parses the package's other files and fails inside (graphScope.cpp), fused or not.
@pytest.mark.parametrize(
    ("name", "shapes"),
    [("silero_vad_op18_ifless", {"input": (1, CHUNK + CONTEXT), "sr": ()}), ("silero_vad_openvino_16k", {})],
)
def test_tensorrt_builds_it(name: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with resources.as_file(resources.files("silero_vad.data") / f"{name}.onnx") as source:
        fuse(source, tmp_path / "vad.onnx")
    build_engine(tmp_path / "vad.onnx", tmp_path / "vad.engine", BuildOptions(opt_shapes=shapes))
    assert (tmp_path / "vad.engine").stat().st_size > 1000
