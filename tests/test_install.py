"""Installation on a device: needs neither torch nor triton; prints its size and time to the first frame."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

import stepcell
from stepcell.files import human_size
from tools import release_check
from tools.install_pinned import write_pins

ROOT = Path(__file__).parent.parent

# The kernels' sources, in Triton's language: read where kernels are compiled, never on a device. Loops over events, in
# numba's: imported where it is installed.
WITHOUT_TORCH = """
import pkgutil, sys
sources = {"stepcell.plugins.kernels.triton." + name for name in "conv epilogue gru language lstm narrow split".split()}
sources.add("stepcell.runtime.media.events.loops")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} must not be imported on a device")
sys.meta_path.insert(0, Refuse())
import stepcell, stepcell.cli, stepcell.runtime, stepcell.plugins
for package in (stepcell.runtime, stepcell.plugins, stepcell.cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__") and module.name not in sources:
            __import__(module.name)
            print(module.name)
"""


def test_runtime_plugins_and_commands_import_without_torch_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stepcell.runtime.loop.step_loop" in done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist."""
    return release_check.build(tmp_path_factory.mktemp("dist"), "--no-isolation")


def test_wheel_and_sdist_hold_every_module_once_and_nothing_else(archives: tuple[Path, Path]) -> None:
    for archive in archives:
        missing, surplus = release_check.compare(archive)
        assert not missing, f"{archive.name} lacks"
        assert not surplus, f"{archive.name} should not have"


def test_version_and_changelog_agree() -> None:
    assert release_check.check_version() == stepcell.__version__


@pytest.mark.slow
def test_wheel_on_a_device(archives: tuple[Path, Path], denoiser_onnx: Path, clip_path: Path, tmp_path: Path) -> None:
    """Wheel, fresh environment with `stepcell[ort,video]`, oldest Python there is, first frame out."""
    wheel, _ = archives
    python = shutil.which("python3.10") or sys.executable
    if subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        python = sys.executable  # a shim without that version behind it
    environment = tmp_path / "env"
    if python == sys.executable:
        venv.create(environment, with_pip=True)
    else:
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
    bare = sum(f.stat().st_size for f in environment.rglob("*") if f.is_file() and not f.is_symlink())
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    write_pins(tmp_path / "pins.txt")
    installed = [str(environment / "bin" / "pip"), "install", "--quiet", "--constraint", str(tmp_path / "pins.txt")]
    subprocess.run([*installed, f"{wheel}[ort,video]"], check=True, env=clean)
    size = sum(f.stat().st_size for f in environment.rglob("*") if f.is_file() and not f.is_symlink()) - bare

    here = str(environment / "bin" / "python")
    listing = subprocess.run([here, "-m", "pip", "list"], capture_output=True, text=True, check=True, env=clean).stdout
    assert "torch" not in listing.split()
    device = {"capture_output": True, "text": True, "env": clean, "cwd": tmp_path}  # not in the repository
    done = subprocess.run([here, "-c", WITHOUT_TORCH], check=False, **device)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    run = [str(environment / "bin" / "stepcell"), "run", str(denoiser_onnx), "--input", str(clip_path)]
    times = []
    for _ in range(3):
        started = time.monotonic()
        first = [*run, "--output", str(tmp_path / "first.npy"), "--limit", "1"]
        done = subprocess.run(first, check=False, **device)  # type: ignore[call-overload]
        times.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
    version = subprocess.run([here, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{version}: stepcell[ort,video] installed {human_size(size)}, wheel {human_size(wheel.stat().st_size)}, ")
    print(f"command to first frame {min(times):.2f} s")
