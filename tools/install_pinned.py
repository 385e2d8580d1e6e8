"""Install stepcell with the pinned packages, each compared with its hash in constraints.txt.

    python tools/install_pinned.py '.[dev]'
    python tools/install_pinned.py 'dist/stepcell-0.1.0-py3-none-any.whl[export]'

pip compares hashes only where it is given exactly the packages to install, while constraints.txt has those of every
Python and machine. So pip first says which of them it needs; then these are installed with hashes, and stepcell itself
at the end. Needs nothing but Python and runs with the interpreter of the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
FIRST = ("pip", "setuptools")  # they install the others


def main(spec: str) -> None:
    """Install `spec`: `.` with extras as an editable package, or the path of a wheel with extras."""
    blocks = locked(LOCK.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(FIRST, blocks, folder)
        pins, report = folder / "pins.txt", folder / "report.json"
        write_pins(pins)
        what = ["--editable", spec] if spec.startswith(".") else [spec]
        pip("--dry-run", "--ignore-installed", "--no-build-isolation", "--report", report, "--constraint", pins, *what)
        needed = json.loads(report.read_text())["install"]
        check_local_builds(needed, blocks)
        found = {normal(each["metadata"]["name"]): each["metadata"]["version"] for each in needed}
        for name, version in found.items():
            blocks[name] = [(pin, exact(block, version)) for pin, block in blocks.get(name, [])]
        install([each for each in found if each not in ("stepcell", *FIRST)], blocks, folder)
    bare = spec.partition("[")[0]
    pip("--no-deps", "--no-build-isolation", *(["--editable", bare] if spec.startswith(".") else [bare]))


def check_local_builds(needed: Sequence[dict[str, Any]], blocks: dict[str, list[tuple[str, str]]]) -> None:
    """Say what to do about builds such as 2.13.0+cpu that are not the pinned one; pip would suspect a manipulated file.

    Args:
        needed: `install` of pip's report.
        blocks: as of `locked`.
    """
    for each in needed:
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        digest = each["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        known = any(str(digest) in block for _, block in blocks.get(normal(name), []))
        public, plus, _ = version.partition("+")
        if plus and digest and not known:
            raise SystemExit(
                f"{name} {version}: constraints.txt has no hash of this build for this Python and machine.\n"
                f"  {public} of PyPI has: take away the index or the folder that offers {version}\n"
                "  (pip config list; PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).\n"
                f"  To use this build, compare its hash with the one its publisher states, and add to {name} there:\n"
                f"    --hash=sha256:{digest}"
            )


def exact(block: str, version: str) -> str:
    """A block for a build with a local version, such as 2.13.0+cpu for 2.13.0; otherwise the block itself.

    pip takes a build with a local version for the pinned one, but prefers another whose hash its index states.
    """
    public, plus, _ = version.partition("+")
    return re.sub(rf"=={re.escape(public)}(?=\s)", f"=={version}", block) if plus else block


def write_pins(path: Path) -> None:
    """Write the versions without hashes, as constraints for a plain `pip install` by a user."""
    path.write_text("".join(pin for each in locked(LOCK.read_text()).values() for pin, _ in each))


def install(names: Sequence[str], blocks: dict[str, list[tuple[str, str]]], folder: Path) -> None:
    """Install packages, each in the pinned version and with one of its hashes."""
    unpinned = [each for each in names if not blocks.get(each)]
    if unpinned:
        raise SystemExit(f"constraints.txt has no {', '.join(unpinned)}; its first lines say how it is made")
    listed = folder / "requirements.txt"
    listed.write_text("".join(block for each in names for _, block in blocks[each]))
    # tensorrt-rtx is a source package; without isolation its build downloads nothing
    pip("--require-hashes", "--no-deps", "--no-build-isolation", "--requirement", listed)


def locked(text: str) -> dict[str, list[tuple[str, str]]]:
    """By normal name: the line without hashes and the whole block, one for each range of Pythons."""
    found: dict[str, list[tuple[str, str]]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)(==[^\\\n]+?)\s*((?:\\\n\s+--hash=\S+\s*)+)$", text, re.MULTILINE):
        block = f"{match[1]}{match[2]} {match[3].rstrip()}\n"
        found.setdefault(normal(match[1]), []).append((f"{match[1]}{match[2]}\n", block))
    return found


def normal(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: object) -> None:
    """`pip install` in this environment."""
    command = [sys.executable, "-m", "pip", "install", "-qq", *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=ROOT if str(arguments[-1]).startswith(".") else None)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1])
