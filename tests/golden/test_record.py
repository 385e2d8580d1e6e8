"""Golden-case recorder: a recorded case has the format that the golden tests read, and its provenance."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.golden import keep
from tests.golden.cases import Case, exported, find_cases, worst_error
from tools.record_golden_case.__main__ import main

# The layout of raft_convgru: h before x, forward(h, x) returns the new state only.
UPSTREAM = """
import torch
from torch import nn

class ConvGRU(nn.Module):
    def __init__(self, hidden_dim, input_dim):
        super().__init__()
        for name in ("convz", "convr", "convq"):
            setattr(self, name, nn.Conv2d(hidden_dim + input_dim, hidden_dim, 3, padding=1))

    def forward(self, h, x):
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz(hx)), torch.sigmoid(self.convr(hx))
        q = torch.tanh(self.convq(torch.cat([r * h, x], dim=1)))
        return (1 - z) * h + z * q

class Swapped(ConvGRU):
    def forward(self, x, h):
        h = super().forward(h, x)
        return h, h
"""
ADAPTER = """
def step(model, inputs, states):
    h = model(states["h"], inputs["x"])
    return {"y": h}, {"h": h}

def forgetful(model, inputs, states):
    h = model(states["h"] * 0, inputs["x"])
    return {"y": h}, {"h": h}
"""
GIT = shutil.which("git")


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    folder = tmp_path / "RAFT"
    (folder / "core").mkdir(parents=True)
    (folder / "core" / "update.py").write_text(UPSTREAM)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    return folder


def record(
    upstream: Path, *arguments: str, factory: str = "core/update.py:ConvGRU", step: str | None = "step"
) -> Result:
    case = upstream.parent / "golden" / "raft_convgru" / "small"
    words = [
        upstream,
        factory,
        "-o",
        case,
        "--set",
        "hidden_dim=3",
        "--set",
        "input_dim=5",
        "--licence",
        "BSD-3-Clause",
    ]
    words += ["--input", "x:TBCHW:5x2x5x7x6", "--state", "h:BCHW:2x3x7x6", "--initial", "random", "--reset", "3:1,0"]
    words += ["--step", f"{upstream.parent / 'adapter.py'}:{step}"] if step else []
    return CliRunner().invoke(main, [str(word) for word in (*words, *arguments)])


def test_a_recorded_case_is_read_by_the_golden_test(upstream: Path, tmp_path: Path) -> None:
    result = record(upstream, "--repository", "https://github.com/princeton-vl/RAFT.git", "--commit", "3fa0bb0")
    assert result.exit_code == 0, result.output
    case = Case(tmp_path / "golden" / "raft_convgru" / "small")
    blobs = case.meta["upstream"].pop("git_blobs")
    assert list(blobs) == ["core/update.py"]
    assert case.meta["upstream"] == {
        "repo": "princeton-vl/RAFT",
        "branch": None,
        "commit": "3fa0bb0",
        "files": "core/update.py",
        "classes": "ConvGRU",
        "license": "BSD-3-Clause",
    }
    assert (case.steps, case.resets) == (5, {3: [False, True]})
    assert case.states("init")["h"].std() > 0.3
    assert case.meta["unused_tensors"] == []
    assert np.abs(case.arrays["y"] - case.arrays["y_f64"]).max() < 1e-5
    assert max(worst_error(case, exported(case, tmp_path)).values()) <= case.tolerance


def test_a_case_of_the_default_calling_convention_is_kept(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = record(upstream, "--repository", "a/b", "--commit", "c", factory="core.update:Swapped", step=None)
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(keep, "KEPT", tmp_path / "kept")
    keep.main([str(tmp_path / "golden" / "raft_convgru" / "small")])
    (case,) = find_cases(places=[tmp_path / "kept"])
    assert (case.name, case.steps, case.states("final")) == ("raft_convgru/small", 3, {})
    assert max(worst_error(case, exported(case, tmp_path)).values()) <= case.tolerance


def test_the_same_seed_gives_the_same_case(upstream: Path, tmp_path: Path) -> None:
    contents = []
    for seed in ("1", "1", "2"):
        assert record(upstream, "--repository", "a/b", "--commit", "c", "--seed", seed).exit_code == 0
        path = tmp_path / "golden" / "raft_convgru" / "small"
        weights = torch.load(path / "checkpoint.pth", weights_only=True)
        contents.append((np.load(path / "io.npz")["y"], weights["convz.weight"]))
    assert np.array_equal(contents[0][0], contents[1][0])
    assert torch.equal(contents[0][1], contents[1][1])
    assert not np.array_equal(contents[0][0], contents[2][0])


@pytest.mark.skipif(GIT is None, reason="needs git")
def test_provenance_comes_from_the_checkout_and_a_changed_file_is_refused(upstream: Path, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = [str(GIT), "-C", str(upstream), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "upstream")
    git("remote", "add", "origin", "git@github.com:princeton-vl/RAFT.git")
    result = record(upstream)
    assert result.exit_code == 0, result.output
    meta = json.loads((tmp_path / "golden" / "raft_convgru" / "small" / "case.json").read_text())
    assert meta["upstream"]["repo"] == "princeton-vl/RAFT"
    assert meta["upstream"]["commit"] == git("rev-parse", "HEAD")
    assert meta["upstream"]["git_blobs"] == {"core/update.py": git("rev-parse", "HEAD:core/update.py")}

    (upstream / "core" / "update.py").write_text(UPSTREAM + "\n# changed\n")
    result = record(upstream)
    assert result.exit_code == 1
    assert "core/update.py: differs from the commit" in result.output
    assert record(upstream, "--patch", "a comment at the end").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "forgetful"}, "the states change the outputs by 0.0e+00 only"),
        ({"factory": "core/update.py:Nothing"}, "expected package.module:name or file.py:name"),
        ({}, "no git checkout with an origin"),
    ],
    ids=["forgetful", "factory", "provenance"],
)
def test_refusals(arguments: dict[str, str], message: str, upstream: Path) -> None:
    result = record(upstream, **arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert not (upstream.parent / "golden").exists()


@pytest.mark.parametrize("text", ["x:TBCHW", "x:TBCHW:6x2", "x:BTCHW:2x6x3x4x5"])
def test_array_descriptions(text: str, upstream: Path) -> None:
    result = record(upstream, "--input", text)
    assert result.exit_code == 1
    assert "expected" in result.output
