"""Release check: version and changelog agree, wheel and sdist are complete, and the wheel works in a clean environment.

python -m tools.release_check            make release-check
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import stepcell
from tools.install_pinned import write_pins

ROOT = Path(__file__).parent.parent
ROOMS = ("exporter", "models", "plugins", "runtime")  # links in stepcell/ to folders of these names
DATA = {"stepcell/py.typed", "stepcell/models/zoo/denoiser.md", "stepcell/models/zoo/denoiser.safetensors"}


def main() -> None:
    """Check everything that docs/releasing.md lists; the first fault ends the program."""
    print(f"version   {check_version()}")
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder))
        for archive in (wheel, sdist):
            missing, surplus = compare(archive)
            if missing or surplus:
                raise SystemExit(f"{archive.name}: missing {sorted(missing)}, not wanted {sorted(surplus)}")
            print(f"complete  {archive.name}")
        run_in_clean_environment(wheel, Path(folder))


def check_version() -> str:
    """The version, after comparing it with the newest entry of the changelog."""
    version = stepcell.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest is None or newest[1] != version:
        raise SystemExit(f"CHANGELOG.md begins with {newest and newest[1]}, stepcell.__version__ is {version}")
    return version


def build(folder: Path, *options: str) -> tuple[Path, Path]:
    """Wheel, built from the sdist, and sdist. They are built from a copy: setuptools writes into the source folder."""
    source, dist = folder / "source", folder / "dist"
    for name in tracked_files():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", *options, "--outdir", str(dist), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, sdist


def tracked_files(*folders: str) -> list[str]:
    """What git tracks, and new files that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def compare(archive: Path) -> tuple[set[str], set[str]]:
    """Files that a wheel or an sdist lacks, and files that it should not have. Duplicates and links are faults too."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
        names = [name for name in names if ".dist-info/" not in name]
    else:
        with tarfile.open(archive) as sdist:
            members = [member for member in sdist if not member.isdir()]
        assert all(member.isfile() for member in members), f"{archive.name}: links"
        names = [member.name.partition("/")[2] for member in members]
        names = [name for name in names if name.startswith("stepcell/")]
    assert len(names) == len(set(names)), f"{archive.name}: a file twice"
    wanted = packaged_files()
    return wanted - set(names), set(names) - wanted


def packaged_files() -> set[str]:
    """Every module, by its path in the package, and the data files."""
    modules = {name for name in tracked_files("stepcell", *ROOMS) if name.endswith(".py") and (ROOT / name).exists()}
    return DATA | {name if name.startswith("stepcell/") else f"stepcell/{name}" for name in modules}


def run_in_clean_environment(wheel: Path, folder: Path) -> None:
    """Install the wheel with `export` and run the first command of the demonstration."""
    venv.create(folder / "env", with_pip=True)
    scripts = folder / "env" / "bin"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    write_pins(folder / "pins.txt")
    constraint = ["--constraint", str(folder / "pins.txt")]
    checkpoint = ROOT / "models" / "zoo" / "denoiser.safetensors"
    for command in (
        ["pip", "install", "--quiet", *constraint, f"{wheel}[export]"],
        ["stepcell", "export", str(checkpoint), "-o", "denoiser.onnx"],
        ["stepcell", "inspect", "denoiser.onnx"],
    ):
        print(f"$ {' '.join(command)}", flush=True)
        subprocess.run([scripts / command[0], *command[1:]], check=True, cwd=folder, env=clean)


if __name__ == "__main__":
    main()
