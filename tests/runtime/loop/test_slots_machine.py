"""Ten thousand random actions on slots against a dictionary of single streams.

The truth is what a user would write: for every stream a state, and plain ONNX Runtime with a
batch of one. Outputs and states are compared bit by bit.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import StateError
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell
from stepcell.runtime.loop.slots import Slot

SLOTS = 3
RUNS, ACTIONS = 140, 100  # some runs end early or have few rules: Hypothesis varies both
SHAPE = (1, 2, 3, 4)
FRAMES = np.random.default_rng(0).uniform(-1, 1, (16, *SHAPE)).astype(np.float32)
ZERO: NDArray[np.float32] = np.zeros((5, 3, 4), np.float32)


@pytest.mark.slow
def test_random_actions_against_single_streams(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model.onnx"
    export_onnx(CellStack([ConvGRUCell(2, 5)]), model, precision="float32")  # runs as it is in the file
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    loop = StepLoop.open(model, slots=SLOTS, threads=1)
    actions: dict[str, int] = {}

    class Machine(RuleBasedStateMachine):
        """`truth` has the state of every attached stream by name; None: the loop has no sizes yet."""

        @initialize()
        def start(self) -> None:
            for slot in loop.slots.values():
                loop.detach(slot)
            loop.reset()
            self.folder = Path(tempfile.mkdtemp(dir=tmp_path))
            self.truth: dict[str, NDArray[np.float32]] = {}
            self.stale: list[Slot] = []
            self.saved: dict[str, NDArray[np.float32]] | None = None
            self.sized = False

        def count(self, name: str) -> None:
            actions[name] = actions.get(name, 0) + 1

        def pick(self, data: st.DataObject) -> list[Slot]:
            return data.draw(st.lists(st.sampled_from(list(loop.slots.values())), unique=True))

        @rule()
        def attach(self) -> None:
            self.count("attach")
            if len(self.truth) == SLOTS:
                with pytest.raises(StateError, match="in use"):
                    loop.attach()
            else:
                name = next(letter for letter in "abcdef" if letter not in self.truth)
                self.truth[loop.attach(name).name] = ZERO

        @precondition(lambda self: self.truth)
        @rule(data=st.data())
        def detach(self, data: st.DataObject) -> None:
            self.count("detach")
            slot = data.draw(st.sampled_from(list(loop.slots.values())))
            loop.detach(slot)
            del self.truth[slot.name]
            self.stale.append(slot)

        @precondition(lambda self: self.truth)
        @rule(data=st.data(), number=st.integers(0, 15))
        def step(self, data: st.DataObject, number: int) -> None:
            self.count("step")
            chosen = self.pick(data)
            frames = {slot: FRAMES[(number + slot.index) % 16] for slot in chosen}
            outputs = loop.step_slots({slot: {"x": frame} for slot, frame in frames.items()})
            assert outputs.keys() == frames.keys()
            for slot, frame in frames.items():
                feed: dict[str, Any] = {"x": frame, "state_in.h": self.truth[slot.name][None]}
                y, state = session.run(["y", "state_out.h"], feed)
                np.testing.assert_array_equal(outputs[slot]["y"], y)
                self.truth[slot.name] = state[0]
            self.sized = self.sized or bool(chosen)

        @precondition(lambda self: self.truth)
        @rule(data=st.data())
        def reset(self, data: st.DataObject) -> None:
            self.count("reset")
            chosen = self.pick(data)
            loop.reset(chosen)
            self.truth.update({slot.name: ZERO for slot in chosen})

        @precondition(lambda self: self.sized)
        @rule()
        def reset_all(self) -> None:
            self.count("reset all")
            loop.reset()
            self.truth = dict.fromkeys(self.truth, ZERO)
            self.sized = False

        @precondition(lambda self: self.truth and self.sized)
        @rule(data=st.data())
        def poison(self, data: st.DataObject) -> None:
            self.count("poison")
            slot = data.draw(st.sampled_from(list(loop.slots.values())))
            state = loop.state()
            state["h"][slot.index] = np.nan
            loop.load_state(state)
            self.truth[slot.name] = np.full_like(ZERO, np.nan)

        @precondition(lambda self: self.sized)
        @rule()
        def save(self) -> None:
            self.count("save")
            loop.save(self.folder / "state.safetensors")
            self.saved = dict(self.truth)

        @precondition(lambda self: self.saved is not None)
        @rule()
        def restore(self) -> None:
            self.count("restore")
            loop.restore(self.folder / "state.safetensors")
            assert self.saved is not None
            self.truth = dict(self.saved)
            assert loop.slots.keys() == self.truth.keys()
            self.stale = [slot for slot in self.stale if loop.slots.get(slot.name) is not slot]

        @precondition(lambda self: self.stale)
        @rule()
        def use_a_detached_slot(self) -> None:
            self.count("detached")
            with pytest.raises(StateError, match="not attached"):
                loop.step_slots({self.stale[-1]: {"x": FRAMES[0]}})

        @invariant()
        def states_are_the_truth(self) -> None:
            if self.sized:
                states = loop.state()["h"]
                for name, slot in loop.slots.items():
                    np.testing.assert_array_equal(states[slot.index], self.truth[name])

        def teardown(self) -> None:
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=ACTIONS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    loop.close()
    print(f"{sum(actions.values())} actions: {actions}")
    assert sum(actions.values()) >= 10_000, actions
    assert min(actions.values()) > 100, actions
