"""Import of a user's factory: the import path of the process is the same afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from stepcell.errors import StepcellError
from stepcell.exporter.from_module.factory import module_from_factory


@pytest.mark.parametrize("name", ["make", "fails", "missing"])
def test_the_import_path_is_restored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    module = f"factory_{name}"
    (tmp_path / f"{module}.py").write_text(
        "import sys\nfrom torch import nn\nimport_path = list(sys.path)\n"
        "def make():\n    import helper_of_factory\n    return nn.Identity()\n"
        "def fails():\n    raise ValueError('no')\n"
    )
    (tmp_path / "helper_of_factory.py").write_text("")
    before = list(sys.path)
    try:
        found = module_from_factory(f"{module}:{name}", {})
    except StepcellError:
        assert name != "make"
    else:
        assert isinstance(found, nn.Identity)
    assert sys.path == before
    assert str(tmp_path) in sys.modules[module].import_path
    for each in (module, "helper_of_factory"):
        sys.modules.pop(each, None)
