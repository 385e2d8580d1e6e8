"""The public Python API: its names, that importing it is light, and that the documents use nothing else."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepcell

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# A name that is added or removed here is added to or removed from what users may rely on: say so in CHANGELOG.md.
PUBLIC = {
    "stepcell": """
        BuildOptions Checkpoint EngineInfo FuseReport Nv12 Pixels RunControl RunError RunReport StateSpec
        StepContract StepLoop StepcellError TensorSpec build_engine export_onnx fuse lift_states load_checkpoint
        load_model quantize open_sink open_source register_cell run_streams step_model
    """,
    "stepcell.models": """
        CellStack ConvGRUCell ConvLSTMCell DenseStack GRUCell LSTMCell StepModule batch_to_time conv_gru
        conv_gru_stack conv_lstm conv_lstm_stack initial_states is_step_module run_sequence save_checkpoint
        seq_wise time_to_batch
    """,
    "stepcell.models.published.e2vid": "FireNet",
    "stepcell.events": "EventSource EventSpec EventWindow Events event_tensor simulate_events write_dat",
    "stepcell.client": "NotAnswered RefusedFrame StreamClient StreamEvent",
    "stepcell.errors": """
        BuildError CheckpointError ContractError DeviceError EngineMismatchError EvaluationError ExportError
        InputError MissingDependencyError OutputError ParityError PluginError StateError StepcellError UsageError
    """,
}


def source_of(module: str) -> ast.Module:
    """The syntax tree of a module, which is not imported: stepcell.models needs torch."""
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def exported(module: str) -> set[str]:
    """The names in __all__."""
    for node in source_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_pinned(module: str) -> None:
    names = set(PUBLIC[module].split())
    assert exported(module) >= names if "published" in module else exported(module) == names


def lazy_names(module: str) -> dict[str, str]:
    """Names that load on first use, with their modules."""
    for node in source_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NAMES":
            table = ast.literal_eval(node.value)
            return {name: f"{module}.{part}" for part, names in table.items() for name in names.split()}
    raise AssertionError(f"{module} has no _NAMES")


@pytest.mark.parametrize("module", ["stepcell", "stepcell.models"])
def test_names_that_load_on_first_use_are_those_that_type_checkers_see(module: str) -> None:
    (checked,) = (node for node in source_of(module).body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == lazy_names(module)
    assert exported(module) == set(seen) <= set(dir(importlib.import_module(module)))


@pytest.mark.parametrize("module", ["stepcell", "stepcell.models"])
def test_every_public_name_loads(module: str) -> None:
    for name, source in lazy_names(module).items():
        if "exporter" in source or "models" in source:
            pytest.importorskip("torch")
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_import_is_light_and_a_wrong_name_is_an_attribute_error() -> None:
    code = """
import sys, stepcell
print(sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "msgspec", "click", "rich", "onnx", "torch"}))
stepcell.StepLoop
print(sorted({name.partition(".")[0] for name in sys.modules} & {"rich", "onnx", "onnxruntime", "torch"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"
    with pytest.raises(AttributeError, match="module 'stepcell' has no attribute 'step_lop'"):
        stepcell.step_lop  # noqa: B018


def test_paths_may_be_strings(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    weights, model, declared, engine = (
        str(tmp_path / name) for name in ("w.safetensors", "m.onnx", "d.onnx", "m.engine")
    )
    stepcell.models.save_checkpoint(stepcell.models.CellStack([stepcell.models.ConvGRUCell(3, 4)]), weights)
    network, family, _ = stepcell.step_model(stepcell.load_checkpoint(weights))
    stepcell.export_onnx(network, model, precision="float32", family=family)
    stepcell.fuse(model, declared, pixels=stepcell.Pixels(range=(0, 1)))
    with stepcell.StepLoop.open(declared) as loop:
        assert loop.contract.inputs[0].range == (0, 1)
    pytest.importorskip("tensorrt_rtx")
    assert stepcell.build_engine(declared, engine).engine == engine


def imports(code: str) -> list[tuple[str, str]]:
    """Module and name of everything that is imported from stepcell."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "stepcell":
            found += [(str(node.module), alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "stepcell"]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_import_public_names_only(document: Path) -> None:
    for block in PYTHON.findall(document.read_text()):
        for module, name in imports(block):
            assert module in PUBLIC, f"{document.name} imports {module}"
            assert name in {"", *PUBLIC[module].split()}, f"{document.name} imports {name} from {module}"


@pytest.mark.parametrize(
    "module", ["stepcell", "stepcell.models", "stepcell.events", "stepcell.client", "stepcell.errors"]
)
def test_api_pages_show_every_public_name(module: str) -> None:
    page = (ROOT / "docs" / "api" / f"{module.removeprefix('stepcell.')}.md").read_text()
    shown = set(re.findall(rf"^::: {re.escape(module)}\.(\w+)$", page, re.MULTILINE))
    assert shown == set(PUBLIC[module].split())
