"""Every command and every Python block of README and docs runs, in the order it is printed."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import islice
from pathlib import Path

import av
import pytest
import torch
from click.testing import CliRunner

from stepcell.cli import main
from stepcell.exporter import export_onnx, load_checkpoint, step_model
from stepcell.models.zoo import denoiser as zoo

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINKED = [*DOCUMENTS, *(ROOT / "docs" / "api").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "models/zoo/denoiser.md"]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\n")  # a first line that names the file a block stands for
# Commands of the README that CI calls itself, and what needs hardware a test has not.
MAKE = {"make demo", "make test"}
NEEDS_GPU = ("--device cuda", "camera:")


@pytest.fixture(scope="session")
def zoo_onnx(exported: Path) -> Path:
    """The trained denoiser as `make demo` exports it."""
    model, family, _ = step_model(load_checkpoint(Path(zoo.__file__).with_name("denoiser.safetensors")))
    export_onnx(model, exported / "zoo.onnx", family=family)
    return exported / "zoo.onnx"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory, clip_path: Path) -> Path:
    """The first 72 frames of the clip: 70 are the most that a command asks for."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(clip_path) as source, av.open(path, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in islice(source.demux(video=0), 72):
            packet.stream = stream
            target.mux(packet)
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo_onnx: Path, clip: Path) -> Path:
    """A folder with the files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(zoo.__file__).with_name("denoiser.safetensors"), "denoiser.safetensors")
    shutil.copy(clip, "clip.mp4")
    shutil.copy(zoo_onnx, "model.onnx")
    shutil.copy(zoo_onnx, "denoiser.onnx")
    return tmp_path


def commands(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning")  # own-module.md says so
@pytest.mark.filterwarnings("ignore:no signature found for:UserWarning")  # of a file of TorchScript
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run(document: Path, workplace: Path) -> None:
    namespace: dict[str, object] = {"__name__": document.stem}
    for language, block in BLOCK.findall(document.read_text()):
        if language == "python":
            if "class Tracker" in block:
                Path("tracker.py").write_text(block)
            if named := FILE.match(block):
                Path(named[1]).write_text(block)
            exec(compile(block, document.name, "exec"), namespace)
            continue
        for line in commands(block):
            if line in MAKE or any(word in line for word in NEEDS_GPU):
                continue
            if "weights.pth" in line:
                torch.save(namespace["Tracker"](8).state_dict(), "weights.pth")  # type: ignore[operator]
            words = shlex.split(line, comments=True)
            assert words[0] == "stepcell", f"{document.name}: {line}: a command that no test runs"
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"{document.name}: {line}\n{result.output}"


def test_readme_makes_its_two_commands_and_ci_calls_them() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in MAKE:
        assert f"$ {command}" in readme
        assert command in ci


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.name)
def test_links_inside_the_repository_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
