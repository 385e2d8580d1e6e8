"""State pairs from names and cells: spellings of public exporters, and cases in which the user is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stepcell.errors import UsageError
from stepcell.exporter.from_onnx.evidence import Evidence, Link
from stepcell.exporter.from_onnx.onnx_file import Port
from stepcell.exporter.from_onnx.pairs import Pairing, find_pairs


def ports(text: str) -> list[Port]:
    """`x:3 h:8 mask:1`: float32 tensors with that many channels."""
    named = [part.partition(":") for part in text.split()]
    return [Port(name, "float32", ("batch", int(size or 8), None, None)) for name, _, size in named]


def pair(
    inputs: str,
    outputs: str,
    cells: Mapping[str, Sequence[str]] | None = None,
    given: Mapping[str, str] | None = None,
    **more: Any,
) -> Pairing:
    """`cells`: by input the outputs that a cell computes from it; an input ending in "?": it may be another's state."""
    links = [
        Link(source.removesuffix("?"), target, "cell r", is_sure=not source.endswith("?"))
        for source, targets in (cells or {}).items()
        for target in targets
    ]
    return find_pairs(ports(inputs), ports(outputs), Evidence(tuple(links), **more), given or {})


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ("r1i r2i", "r1o r2o", "r1 r2"),
        ("h h_", "h_next", None),
        ("h0 h1", "h0_out h1_out", "h0 h1"),
        ("h0 c0", "h0_n c0_n", "h0 c0"),
        ("prev_h_enc0 prev_c_enc0", "out_h_enc0 out_c_enc0", "h_enc0 c_enc0"),
        ("cached_0 cached_1", "new_cached_0 new_cached_1", "cached_0 cached_1"),
        ("past_h0 past_c0", "present_h0 present_c0", "h0 c0"),
        ("past_key_values.0.key", "present.0.key", "past_key_values.0.key"),
        ("hidden0 hidden1", "next_hidden0 next_hidden1", "hidden0 hidden1"),
        ("state state_c", "stateN state_cN", "state state_c"),
        ("hx cx", "hy cy", "h c"),
        ("htprev", "htnext", "ht"),
        ("h0", "hT", "h"),
        ("h c", "ch cc", "h c"),
        ("h c", "hn cn", "h c"),
        ("h0 c0", "hn cn", "h c"),
        ("initial_h initial_c", "Y_h Y_c", "h c"),
        ("h_in c_in", "h_out c_out", "h c"),
        ("lstmStateIn", "lstmStateOut", "lstmState"),
        ("state_0", "new_state_0", "state_0"),
        ("encoder/gru/hidden_in", "encoder/gru/hidden_out", "encoder_gru_hidden"),
        ("net", "net_next", "net"),
    ],
)
def test_spellings(before: str, after: str, names: str | None) -> None:
    if names is None:
        with pytest.raises(UsageError):
            pair(f"x:3 {before}", f"{after} y:3")
        return
    # Outputs in reverse, so that order cannot be what pairs them.
    found = pair(f"x:3 {before}", " ".join([*reversed(after.split()), "y:3"]))
    assert [(p.input, p.output) for p in found.pairs] == list(zip(before.split(), after.split(), strict=True))
    assert [p.name for p in found.pairs] == names.split()
    assert not found.notes


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ("x:3", "y:3"),
        ("frame:3", "next_frame:3"),
        ("prev_frame:3 frame:3", "next_frame:3"),
        ("image_in:3", "image_out:3"),
        ("src:3", "fgr:3 pha:1"),
        ("net:8", "net_out:8"),
        ("x:3 mask:1", "y:3 mask_out:1"),
        ("cz cr cq inp", "features"),
    ],
)
def test_data_is_not_taken_for_a_state(inputs: str, outputs: str) -> None:
    assert pair(inputs, outputs).pairs == ()


def test_named_alike_without_a_word_is_a_note_and_a_cell_decides() -> None:
    assert "--state net=net_out" in pair("net x:3", "net_out").notes[0]
    assert [(p.input, p.name) for p in pair("net x:3", "net_out", {"net": ["net_out"]}).pairs] == [("net", "net")]


def test_dtype_and_shape_must_fit() -> None:
    assert pair("h:8 x:3", "h_next:9").pairs == ()
    half = [Port("h_next", "float16", ("batch", 8, None, None))]
    assert find_pairs(ports("h x:3"), half, Evidence(), {}).pairs == ()


def test_cells_pair_what_no_name_pairs() -> None:
    cells = {"mem_a": ["trace_p"], "mem_b": ["trace_q"]}
    found = pair("events:5 mem_a mem_b", "trace_q image:1 trace_p", cells)
    assert [(p.input, p.output, p.name) for p in found.pairs] == [
        ("mem_a", "trace_p", "mem_a"),
        ("mem_b", "trace_q", "mem_b"),
    ]
    counted = pair("x:5 s0 s1", "t1 t0", {"s0": ["t0"], "s1": ["t1"]})
    assert [(p.input, p.output) for p in counted.pairs] == [("s0", "t0"), ("s1", "t1")]


def test_a_cell_that_may_merge_two_inputs_of_one_step() -> None:
    found = pair("decoder:4 skip", "merged", {"skip?": ["merged"]})
    assert found.pairs == ()
    assert "skip is named like data; if merged is fed back: --state skip=merged" in found.notes[0]
    with pytest.raises(UsageError, match="cell r may read it as its old state") as caught:
        pair("decoder:4 a", "merged", {"a?": ["merged"]})
    assert "--state a=merged or --state a= (" in str(caught.value.hint)
    assert "--stateless" in str(caught.value.hint)


def test_what_the_graph_computes_from_one_another_is_a_state_whatever_the_names() -> None:
    found = pair("input_1:3 input_2 input_3", "output_1:3 output_2 output_3", {"input_2": ["output_2"]})
    assert [(p.input, p.output) for p in found.pairs] == [("input_2", "output_2")]
    assert "input_2 is a state, and output_2 its next value: cell r" in found.notes[0]
    crossed = pair("x:5 s0 s1", "t0 t1", {"s0": ["t1"], "s1": ["t0"]})
    assert [(p.input, p.output) for p in crossed.pairs] == [("s0", "t1"), ("s1", "t0")]
    with pytest.raises(UsageError, match="feat: cell r may read it"):  # named like data, and the graph says otherwise
        pair("x:3 feat", "y:3 a", {"feat": ["a"]})


def test_what_may_be_a_state_is_asked_about() -> None:
    reads = {"b": frozenset({"noise", "a"}), "last": frozenset({"noise"})}
    with pytest.raises(UsageError, match="a: it may be a state: its dtype and shape are those of: b") as caught:
        pair("noise:3 a", "clean:3 b", reads=reads)
    assert "--state a=b or --state a= (" in str(caught.value.hint)
    assert pair("noise:3 a", "clean:3 b", given={"a": ""}, reads=reads).pairs == ()
    with pytest.raises(UsageError, match="before: it may be a state"):  # the frame comes back as it is
        pair("noise:3 before:3", "last:3", reads={"last": frozenset({"noise"})}, copies={"last": "noise"})
    assert pair("noise:3 a", "clean:3 b", reads={"b": frozenset({"noise"})}).pairs == ()  # b does not depend on a
    assert pair("noise:3", "clean:3", reads={"clean": frozenset({"noise"})}).pairs == ()  # the only input is data


@pytest.mark.parametrize(
    ("inputs", "outputs", "cells", "arguments"),
    [
        ("mem_a mem_b", "p q", {}, ["--state mem_a=p or --state mem_a=q", "--state mem_b=p"]),
        ("x:3 h", "h_next h_new", {}, ["--state h=h_new or --state h=h_next"]),
        ("h h_in", "h_out", {}, ["--state h=h_out", "--state h_in=h_out"]),
        ("h c", "h_out c_out", {"h": ["c_out"], "c": ["h_out"]}, ["--state h=c_out or --state h=h_out"]),
        ("mem", "a b", {"mem": ["a", "b"]}, ["--state mem=a or --state mem=b"]),
        ("lstm_a lstm_b", "u v", {"lstm_a": ["u"], "lstm_b": ["u"]}, ["--state lstm_a=u", "--state lstm_b=u"]),
    ],
)
def test_what_is_not_clear_is_asked(
    inputs: str, outputs: str, cells: Mapping[str, Sequence[str]], arguments: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        pair(inputs, outputs, cells)
    assert caught.value.hint is not None
    for argument in arguments:
        assert argument in caught.value.hint


def test_the_user_wins() -> None:
    swapped = pair("h c", "h_out c_out", {}, {"h": "c_out", "c": "h_out"})
    assert [(p.input, p.output, p.name) for p in swapped.pairs] == [("h", "c_out", "h"), ("c", "h_out", "c")]
    assert pair("h x:3", "h_next", {}, {"h": ""}).pairs == ()
    assert swapped.notes == (), "names alone prove nothing"
    one = pair("mem_a mem_b", "p q", {}, {"mem_a": "q", "mem_b": "p"})
    assert [(p.input, p.output) for p in one.pairs] == [("mem_a", "q"), ("mem_b", "p")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"g": "h_next"}, "--state g=h_next: no such input"),
        ({"h": "g"}, "--state h=g: no such output"),
        ({"h": "y"}, "input and output of a state have one dtype and shape"),
        ({"h": "h_next", "x": "h_next"}, "given twice"),
    ],
)
def test_wrong_arguments(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pair("x h", "h_next y:3", {}, given)


def test_names_do_not_clash() -> None:
    found = pair("past_h h_in", "present_h h_next", {}, {"past_h": "present_h", "h_in": "h_next"})
    assert len({p.name for p in found.pairs}) == 2
