"""Every package that CI installs has hashes, and a changed one is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.install_pinned import FIRST, LOCK, check_local_builds, exact, install, locked, normal

EXTRAS = re.compile(r'^\s+"([A-Za-z0-9._-]+)', re.MULTILINE)


def test_the_lock_has_hashes_for_all() -> None:
    text = LOCK.read_text()
    blocks = locked(text)
    assert sum(map(len, blocks.values())) == len(re.findall(r"^[^#\s][^=\n]*==", text, re.MULTILINE))
    assert set(FIRST) <= set(blocks)
    assert all("--hash=sha256:" in block for each in blocks.values() for _, block in each)
    assert "://" not in text
    declared = set(map(normal, EXTRAS.findall((LOCK.parent / "pyproject.toml").read_text())))
    assert {"torch", "onnx", "numpy", "av"} & declared <= set(blocks)


def test_builds_with_a_local_version_keep_it() -> None:
    block = "torch==2.13.0 ; sys_platform == 'linux' --hash=sha256:00\n"
    assert exact(block, "2.13.0+cpu") == "torch==2.13.0+cpu ; sys_platform == 'linux' --hash=sha256:00\n"
    assert exact(block, "2.13.0") == block


def test_a_build_with_a_local_version_that_is_not_pinned_is_explained() -> None:
    blocks = locked(f"torch==2.13.0 \\\n    --hash=sha256:{'1' * 64}\n")

    def reported(version: str, digest: str) -> list[dict[str, Any]]:
        return [
            {
                "metadata": {"name": "torch", "version": version},
                "download_info": {"url": "https://host/torch.whl", "archive_info": {"hashes": {"sha256": digest}}},
            }
        ]

    check_local_builds(reported("2.13.0+cpu", "1" * 64), blocks)
    check_local_builds(reported("2.13.0", "2" * 64), blocks)  # pip refuses it
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0\+cpu: constraints\.txt has no hash of this build") as refused:
        check_local_builds(reported("2.13.0+cpu", "2" * 64), blocks)
    assert f"--hash=sha256:{'2' * 64}" in str(refused.value)
    assert "PIP_EXTRA_INDEX_URL" in str(refused.value)


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel made here, so that no network is needed."""
    wheel = tmp_path / "lone-1.0-py3-none-any.whl"
    script = (
        "import sys, zipfile\n"
        "with zipfile.ZipFile(sys.argv[1], 'w') as z:\n"
        "    z.writestr('lone.py', '')\n"
        "    z.writestr('lone-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: lone\\nVersion: 1.0\\n')\n"
        "    tags = 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n'\n"
        "    z.writestr('lone-1.0.dist-info/WHEEL', tags)\n"
        "    z.writestr('lone-1.0.dist-info/RECORD', '')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(wheel)], check=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "here"))
    wrong = {"lone": [("lone==1.0\n", f"lone==1.0 --hash=sha256:{'0' * 64}\n")]}
    with pytest.raises(SystemExit):
        install(["lone"], wrong, tmp_path)
    assert not (tmp_path / "here").exists()
    with pytest.raises(SystemExit, match=r"constraints\.txt has no other"):
        install(["other"], wrong, tmp_path)
