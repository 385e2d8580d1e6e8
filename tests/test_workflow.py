"""CI, pre-commit hooks and make call the same tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    return set(phony.split())


def test_ci_calls_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = [*steps, *re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)]
    words = {word for line in called for word in re.sub(r"PYTHONS=.*", "", line).split()[1:]}
    assert {"lint", "docs", "test", "demo", "test-pythons"} <= words <= targets()


def test_hooks_are_the_linters_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = MAKEFILE[MAKEFILE.index("\nlint:") :]
    for hook in hooks:
        tool = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix")
        assert f"$(BIN)/{tool}" in lint, hook["id"]


def test_every_supported_python_is_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    pythons = workflow["jobs"]["pythons"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert f"PYTHONS ?= {' '.join(pythons)}" in MAKEFILE
