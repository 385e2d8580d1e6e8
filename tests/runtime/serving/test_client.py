"""The client against the server's side, over a network that loses, delays and repeats, and servers that are killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.client import NotAnswered, RefusedFrame, StreamClient, StreamEvent
from stepcell.errors import UsageError
from stepcell.runtime.serving import client as client_module
from stepcell.runtime.serving.triton_transport import TritonTransport
from tests.runtime.serving.network import Network
from tests.runtime.serving.serving_model import alone, clip, order_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import _write_model

    return order_model(tmp_path_factory.mktemp("model") / "order.onnx", _write_model)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.0)


Connect = Callable[..., tuple[StreamClient, list[StreamEvent]]]


def connect(network: Network, **options: Any) -> tuple[StreamClient, list[StreamEvent]]:
    events: list[StreamEvent] = []
    return StreamClient("", "", transport=network, on_event=events.append, **options), events


def test_frames_equal_a_loop_of_their_own(model: Path) -> None:
    network, frames = Network(model, None), clip(0, 20)
    client, events = connect(network)
    with client as stream:
        for frame, wanted in zip(frames, alone(model, frames), strict=True):
            np.testing.assert_array_equal(stream.step(x=frame[0])["y"], wanted[0])
        assert len(network.table) == 1
    assert not events
    assert len(network.table) == 0  # END freed the slot
    assert network.table.counts.frames == 20


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_network_and_killed_servers_change_no_answer(model: Path, tmp_path: Path, seed: int) -> None:
    frames = clip(seed, 150)
    network = Network(model, tmp_path, hurt=0.1, seed=seed)
    client, events = connect(network)
    for number, (frame, wanted) in enumerate(zip(frames, alone(model, frames), strict=True)):
        np.testing.assert_array_equal(client.step(x=frame[0])["y"], wanted[0], err_msg=f"frame {number}")
    kinds = {event.kind for event in events}
    print(f"seed {seed}: {len(events)} events, {kinds}")
    assert {"unreachable", "resumed", "replayed"} <= kinds <= {"unreachable", "resumed", "replayed", "restarted"}


def test_a_killed_server_is_told_and_its_frames_are_sent_again(model: Path, tmp_path: Path) -> None:
    frames = clip(0, 20)
    network = Network(model, tmp_path)
    client, events = connect(network)
    wanted = alone(model, frames)
    for number in range(13):
        client.step(x=frames[number][0])
    network.restart()
    np.testing.assert_array_equal(client.step(x=frames[13][0])["y"], wanted[13][0])
    assert [(event.kind, event.frame) for event in events] == [("resumed", 10), ("replayed", 13)]


def test_a_short_stream_is_sent_again_from_its_start(model: Path, tmp_path: Path) -> None:
    frames = clip(0, 20)
    network = Network(model, tmp_path)
    client, events = connect(network)
    wanted = alone(model, frames)
    for number in range(4):
        client.step(x=frames[number][0])
    network.restart()
    np.testing.assert_array_equal(client.step(x=frames[4][0])["y"], wanted[4][0])
    assert [(event.kind, event.frame) for event in events] == [("restarted", 0), ("replayed", 4)]


def test_a_state_that_cannot_be_had_again_is_an_error_until_restart(model: Path) -> None:
    frames = clip(0, 20)
    network = Network(model, None)
    client, events = connect(network, replay=4)
    for number in range(10):
        client.step(x=frames[number][0])
    network.restart()
    for _ in range(2):
        with pytest.raises(RefusedFrame, match="STATE_LOST"):
            client.step(x=frames[10][0])
    assert [event.kind for event in events] == ["lost"]
    before = client.stream
    client.restart()
    np.testing.assert_array_equal(client.step(x=frames[0][0])["y"], alone(model, frames[:1])[0][0])
    assert client.stream != before


def test_a_frame_that_was_not_answered_is_stepped_before_the_next(model: Path) -> None:
    frames = clip(0, 20)
    network = Network(model, None)
    client, _ = connect(network, deadline=0.0)
    wanted = alone(model, frames)
    client.step(x=frames[0][0])
    network.up = False
    with pytest.raises(NotAnswered):
        client.step(x=frames[1][0])
    network.up = True
    client._deadline = 10.0
    np.testing.assert_array_equal(client.step(x=frames[2][0])["y"], wanted[2][0])


def test_a_bad_frame_is_not_part_of_the_stream(model: Path) -> None:
    frames = clip(0, 20)
    client, _ = connect(Network(model, None))
    client.step(x=frames[0][0])
    with pytest.raises(RefusedFrame, match=r"BAD_FRAME.*NaN"):
        client.step(x=np.full_like(frames[1][0], np.nan))
    np.testing.assert_array_equal(client.step(x=frames[1][0])["y"], alone(model, frames[:2])[1][0])


def test_a_full_server_refuses_a_new_stream_at_once(model: Path) -> None:
    frames, network = clip(0, 20), Network(model, None, slots=1)
    first, second = connect(network)[0], connect(network)[0]
    first.step(x=frames[0][0])
    with pytest.raises(RefusedFrame, match="FULL"):
        second.step(x=frames[0][0])
    first.close()
    np.testing.assert_array_equal(second.step(x=frames[0][0])["y"], alone(model, frames[:1])[0][0])


@pytest.mark.parametrize("url", ["tcp://host:1", "host", "http://host:port", "http://"])
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--server"):
        TritonTransport(url, "model")


def test_named_errors_are_found_in_the_text_of_a_server() -> None:
    found = RefusedFrame.parse("[500] in ensemble: RESUMED_AT 20: the state is that of a snapshot")
    assert found is not None
    assert (found.name, found.frame, found.reason) == ("RESUMED_AT", 20, "the state is that of a snapshot")
    full = RefusedFrame("FULL", "all 4 slots are in use")
    assert RefusedFrame.parse(full.message) is not None
    assert RefusedFrame.parse("inference request must specify the START flag") is None
