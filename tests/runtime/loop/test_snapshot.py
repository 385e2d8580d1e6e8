"""Snapshots: which models and loops accept them, and damaged files."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.contract import METADATA_KEY, InitialValue, Parity, StepContract
from stepcell.errors import InputError, OutputError, StateError
from stepcell.runtime.loop.snapshot import Snapshot, contract_hash, read_snapshot, write_snapshot

Model = Callable[..., Path]
ONE = np.ones((1, 3, 2, 2), np.float32)


def frames(count: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((count, *shape), np.float32)


def test_another_process_would_go_on_bit_by_bit(denoiser_onnx: Path, tmp_path: Path) -> None:
    path, xs = tmp_path / "state.safetensors", frames(40, 2, 3, 16, 24)
    with StepLoop.open(denoiser_onnx) as loop:
        for x in xs[:20]:
            loop.step(x=x)
        loop.save(path, frame=20, metadata={"camera": "front"})
        expected = [loop.step(x=x)["y"] for x in xs[20:]]
        loop.restore(path)  # in the same loop
        again = [loop.step(x=x)["y"] for x in xs[20:]]
    with StepLoop.open(denoiser_onnx) as fresh:
        snapshot = fresh.restore(path)  # before the first step
        fresh.save(tmp_path / "again.safetensors", frame=20, metadata={"camera": "front"})
        elsewhere = [fresh.step(x=x)["y"] for x in xs[20:]]
    assert (snapshot.frame, snapshot.metadata, snapshot.slots) == (20, {"camera": "front"}, None)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(elsewhere, expected)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes(), "restored, and saved before a step"


def test_float16_model_and_its_float32_form_take_each_other_s_snapshots(denoiser_onnx: Path, tmp_path: Path) -> None:
    path, xs = tmp_path / "state.safetensors", frames(10, 1, 3, 16, 16)
    with StepLoop.open(denoiser_onnx) as wide, StepLoop.open(denoiser_onnx, keep_float16=True) as narrow:
        for x in xs:
            wide.step(x=x)
        wide.save(path)
        narrow.restore(path)
        narrow.step(x=xs[0])
        difference = np.abs(narrow.state()["h"] - (wide.step(x=xs[0]) and wide.state()["h"])).max()
    assert difference < 4 * 2**-11


def test_slots_are_in_it(accumulator: Model, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with StepLoop.open(accumulator(), slots=4) as loop:
        first, front, rear = loop.attach(), loop.attach("front"), loop.attach("rear")
        loop.step_slots({first: {"x": 9 * ONE}, front: {"x": ONE}, rear: {"x": 2 * ONE}})
        loop.detach(first)
        loop.save(path)
        loop.detach(rear)
        loop.attach("late")
        loop.restore(path)
        assert loop.slots["front"] is front, "a slot that is still where it was stays good"
        with pytest.raises(StateError, match="not attached"):
            loop.step_slots({rear: {"x": ONE}})
    with StepLoop.open(accumulator(), slots=4) as other:
        snapshot = other.restore(path)
        assert snapshot.slots == {name: slot.index for name, slot in other.slots.items()} == {"front": 1, "rear": 2}
        new = other.attach("new")  # in row 0, before the first step: not what the detached one left there
        outputs = other.step_slots({slot: {"x": ONE} for slot in (new, *other.slots.values())})
        assert {slot.name: y["y"].max() for slot, y in outputs.items()} == {"front": 2, "rear": 3, "new": 1}


@pytest.mark.parametrize(("taken", "opened"), [(4, 3), (4, None), (None, 4)])
def test_another_number_of_slots_is_refused(
    accumulator: Model, tmp_path: Path, taken: int | None, opened: int | None
) -> None:
    path = tmp_path / "state.safetensors"
    with StepLoop.open(accumulator(), slots=taken) as loop:
        if taken:
            loop.step_slots({loop.attach(): {"x": ONE}})
        else:
            loop.step(x=ONE)
        loop.save(path)
    with StepLoop.open(accumulator(), slots=opened) as loop, pytest.raises(StateError) as caught:
        loop.restore(path)
    said = [f"slots={count}" if count else "no slots" for count in (taken, opened)]
    assert caught.value.message.endswith(f"was taken from a loop with {said[0]}, this one has {said[1]}")


def test_another_size_is_refused_and_changes_nothing(accumulator: Model, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=np.ones((1, 3, 4, 4), np.float32))
        loop.save(path)
        loop.reset()
        loop.step(x=ONE)
        with pytest.raises(StateError, match=r"h: expected shape \(1, 3, 2, 2\)"):
            loop.restore(path)
        assert loop.step(x=ONE)["y"].max() == 2


def test_without_a_step_there_is_nothing_to_save(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop, pytest.raises(StateError, match="no step has run yet"):
        loop.save(tmp_path / "state.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def contract_of(path: Path) -> StepContract:
    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == METADATA_KEY]
    return StepContract.from_json(entry.value)


def test_what_must_agree_and_what_need_not(denoiser_onnx: Path) -> None:
    contract = contract_of(denoiser_onnx)
    contract = msgspec.structs.replace(contract, source={"checkpoint_sha256": "1", "arguments": {}, "torch": "2.11"})
    replace, own = msgspec.structs.replace, contract_hash(contract)
    (state,) = contract.states
    wide = replace(state, dtype="float16", shape=(1, 8, 32, 48))
    learned = replace(state, init=InitialValue.of(np.ones((8, 1, 1), np.float32)))
    for same in (
        replace(contract, parity=Parity(steps=1, reference="other", max_abs_error={})),
        replace(contract, source={**contract.source, "torch": "2.13", "stepcell": "9", "opset": 22}),
        replace(contract, precision="float32", states=(wide,), example={"batch": 1}),
    ):
        assert contract_hash(same) == own
    others = (
        replace(contract, source={**contract.source, "checkpoint_sha256": "2"}),
        replace(contract, source={**contract.source, "arguments": {"hidden": 9}}),
        replace(contract, source={"onnx_sha256": "1", "arguments": {}}),
        replace(contract, family="other"),
        replace(contract, states=(replace(state, name="g"),)),
        replace(contract, states=(state, replace(state, name="c"))),
        replace(contract, states=(learned,)),
        replace(contract, states=(replace(learned, init=InitialValue.of(np.zeros((8, 1, 1), np.float32))),)),
    )
    assert len({own, *map(contract_hash, others)}) == 1 + len(others)
    renamed = [replace(contract, family=name) for name in ("seed000_gru_heads", "pooled_gru_heads")]
    assert len(set(map(contract_hash, renamed))) == 1, "a renamed family's snapshots stay valid"


def test_another_model_is_refused(accumulator: Model, denoiser_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=ONE)
        loop.save(path)
    with StepLoop.open(denoiser_onnx) as loop, pytest.raises(StateError, match="a snapshot of another model") as caught:
        loop.restore(path)
    assert caught.value.hint is not None


def saved(accumulator: Model, path: Path) -> StepContract:
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=ONE)
        loop.save(path, metadata={"user": "data"})
        return loop.contract


def test_cut_off_or_changed_anywhere_is_refused(accumulator: Model, tmp_path: Path) -> None:
    path, damaged = tmp_path / "state.safetensors", tmp_path / "damaged.safetensors"
    contract = saved(accumulator, path)
    whole = path.read_bytes()
    states, _ = read_snapshot(path, contract)
    np.testing.assert_array_equal(states["h"], ONE)
    for length in range(0, len(whole), 7):
        damaged.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"damaged\.safetensors: is not a complete"):
            read_snapshot(damaged, contract)
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(changed)
        with pytest.raises(InputError):
            read_snapshot(damaged, contract)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"text", "not a complete .safetensors file"),
        ({}, "its metadata has no key"),
        ({"stepcell.snapshot": "{}"}, "malformed snapshot"),
        ({"stepcell.snapshot": '{"schema": "1.0", "contract_hash": ""}'}, r"schema 1\.0 is not supported"),
        ({"stepcell.snapshot": '{"contract_hash": "", "frame": -1}'}, "malformed snapshot"),
        ({"stepcell.snapshot": '{"contract_hash": ""}'}, "does not match its checksum"),
    ],
    ids=["absent", "text", "weights", "json", "schema", "frame", "unsealed"],
)
def test_files_that_are_no_snapshot(accumulator: Model, tmp_path: Path, content: Any, message: str) -> None:
    from safetensors.numpy import save

    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else save({"h": ONE}, content))
    with StepLoop.open(accumulator()) as loop, pytest.raises(InputError, match=message):
        loop.restore(path)


@pytest.mark.parametrize(
    ("slots", "message"), [({"a": 2}, r"slots in rows \[2\] of 2"), ({"a": 1, "b": 1}, r"rows \[1, 1\] of 2")]
)
def test_rows_that_cannot_be(accumulator: Model, tmp_path: Path, slots: dict[str, int], message: str) -> None:
    path = tmp_path / "state.safetensors"
    write_snapshot(path, {"h": ONE}, Snapshot(contract_hash="", rows=2, slots=slots))
    with pytest.raises(InputError, match=message):
        read_snapshot(path, contract_of(accumulator()))


def test_a_file_that_cannot_be_written_leaves_the_old_one(accumulator: Model, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    saved(accumulator, path)
    old = path.read_bytes()
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=ONE)
        with pytest.raises(OutputError):
            loop.save(tmp_path / "none" / "state.safetensors")
    assert path.read_bytes() == old


def test_a_folder_that_cannot_be_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example in a folder that the user may write to but not list: an error of the run, not a traceback."""
    fsync = os.fsync

    def refusing(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise PermissionError(13, "Permission denied")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(OutputError, match=r"cannot be synchronised to the disk \(Permission denied\)"):
        write_snapshot(tmp_path / "s.safetensors", {"h": ONE}, Snapshot(contract_hash="1"))


WRITER = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from stepcell.runtime.loop.snapshot import Snapshot, write_snapshot

path, contract_hash, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
replace = Path.replace

def save(frame):
    state = np.full((1, 64, 64, 64), frame, np.float32)
    write_snapshot(path, {"h": state}, Snapshot(contract_hash=contract_hash, frame=frame))

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

save(1)
if moment == "half written":  # the kernel ends the process in a write
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
elif moment == "written":
    os.fsync = die
elif moment == "synchronised":
    Path.replace = die
else:
    Path.replace = lambda *paths: die(replace(*paths))
save(2)
"""


@pytest.mark.parametrize(
    ("moment", "size"), [("half written", 500_000), ("written", 1 << 20), ("synchronised", 1 << 20), ("renamed", 0)]
)
def test_killed_while_saving_leaves_a_whole_file(accumulator: Model, tmp_path: Path, moment: str, size: int) -> None:
    """The old file until the new one is whole; the next writer removes what is left."""
    path = tmp_path / "state.safetensors"
    contract = contract_of(accumulator())
    command = [sys.executable, "-c", WRITER, str(path), contract_hash(contract), moment]
    process = subprocess.run(command, capture_output=True, check=False)
    expected = signal.SIGXFSZ if moment == "half written" else signal.SIGKILL
    assert process.returncode == -expected, process.stderr
    states, snapshot = read_snapshot(path, contract)
    assert (states["h"] == snapshot.frame).all()
    assert snapshot.frame == (2 if moment == "renamed" else 1)
    left = [hidden.stat().st_size for hidden in tmp_path.glob(".*")]
    assert len(left) == (size > 0)
    assert all(size <= found < size + 1000 for found in left)
    write_snapshot(path, {"h": ONE}, Snapshot(contract_hash="1"))
    assert list(tmp_path.glob("*.safetensors")) == [path]
    assert not list(tmp_path.glob(".*"))


def test_written_whole(tmp_path: Path) -> None:
    """The format on disk, read without stepcell."""
    from safetensors import safe_open

    path = tmp_path / "state.safetensors"
    write_snapshot(path, {"h": ONE.transpose(0, 3, 1, 2)}, Snapshot(contract_hash="1", frame=3))
    with safe_open(path, "numpy") as file:
        document = msgspec.json.decode(file.metadata()["stepcell.snapshot"])
        np.testing.assert_array_equal(file.get_tensor("h"), ONE.transpose(0, 3, 1, 2))
    assert (document["schema"], document["frame"], document["slots"]) == ("2.0", 3, None)
