"""Every golden case of every known family: exported, stepped, equal to upstream."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepcell.exporter import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))
from cases import Case, find_cases, worst_error

CASES = [case for case in find_cases() if case.system in FAMILIES]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_exported_file_equals_upstream(case: Case, tmp_path: Path) -> None:
    worst = worst_error(case, tmp_path)
    print(f"{case.name}: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    assert worst, "nothing was compared"
    assert max(worst.values()) <= case.tolerance
