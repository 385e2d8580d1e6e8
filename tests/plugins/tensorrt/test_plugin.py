"""The plugin through the vendor's own types: TensorRT-RTX and, where it is installed, TensorRT lean."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from stepcell.errors import EngineMismatchError, InputError, PluginError, StepcellError, UsageError
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import arguments_of, cell_word
from stepcell.plugins.kernels.image import SCHEMA, ImageInfo, KernelImage
from stepcell.plugins.kernels.signature import PARAMETERS, kernels_of
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION, interface_digest, pack_fields, read_fields
from stepcell.plugins.tensorrt.registry import kernels_offered, register
from stepcell.plugins.tensorrt.step import workspace_size
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of

GRU = CellConfig.from_label("gru_x3_h5_k3x3_soft_float32")
LSTM = CellConfig.from_label("lstm-map_x12_h8_k5x1_hard_float16")
CELLS = [
    GRU,
    LSTM,
    CellConfig.from_label("gru-after_x8_h16_k1x1_soft_float16"),
    CellConfig.from_label("lstm_x3_h5_k3x3_soft_float32"),
]
# and whether y of the last step is among the inputs
NODES = [(cell, given) for cell in CELLS for given in (False, True) if not given or cell.state_dtype == "float32"]
NODE_IDS = [f"{cell.label}{'-fp16-mirror' if given else ''}" for cell, given in NODES]
MAX_PIXELS = 4 * 64 * 96


def images(cell: CellConfig, tiles: int = 2) -> tuple[KernelImage, ...]:
    """Images as the compiler describes them, with other bytes for the code."""
    found = []
    for kernel in kernels_of(cell, fp16_mirror=False):
        for tile in range(1 if kernel == "narrow_state" else tiles):
            cubin = f"{kernel} {tile}".encode()
            info = ImageInfo(
                schema=SCHEMA,
                key=f"{kernel}-{tile}",
                source="",
                kernel=kernel,
                cell=cell_word(kernel, cell),
                tile=str(tile),
                capability="8.7",
                entry=kernel,
                warps=4,
                shared_bytes=0,
                registers=0,
                tensor_core_instructions=0,
                spill_instructions=0,
                grid_pixels=64,
                grid_channels=1,
                max_pixels=MAX_PIXELS,
                arguments=arguments_of(kernel),
                sha256=hashlib.sha256(cubin).hexdigest(),
                triton="",
            )
            found.append(KernelImage(info, cubin))
    return tuple(found)


@pytest.fixture(params=["tensorrt_rtx", "tensorrt_lean_bindings"])
def trt(request: pytest.FixtureRequest) -> Any:
    module = pytest.importorskip(request.param, exc_type=ImportError)
    register(module)
    return module


def creator(trt: Any, op: str) -> Any:
    return trt.get_plugin_registry().get_creator(op, PLUGIN_VERSION, "stepcell")


def from_node(
    trt: Any, cell: CellConfig, label: bytes | None = None, op: str | None = None, *, fp16_mirror: bool = False
) -> Any:
    """What the ONNX parser makes of a node: the text of an attribute ends with a zero byte, a number has 4 bytes."""
    text = cell.label.encode() + b"\0" if label is None else label
    listed = [trt.PluginField("cell", np.frombuffer(text, np.int8), trt.PluginFieldType.CHAR)]
    if fp16_mirror:
        listed.append(trt.PluginField("fp16_mirror", np.ones(1, np.int32), trt.PluginFieldType.INT32))
    fields = trt.PluginFieldCollection(listed)
    with kernels_offered({cell.label: images(cell)}):
        return creator(trt, op or cell.op).create_plugin("node", fields, trt.TensorRTPhase.BUILD)


def shapes_of(cell: CellConfig, fp16_mirror: bool, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for tensor in (*inputs_of(cell, fp16_mirror=fp16_mirror), *outputs_of(cell)):
        channels = cell.inputs if tensor.buffer == "x" else cell.hidden
        shapes.append((100,) if "." in tensor.buffer else (batch, channels, height, width))
    return shapes


def described(
    trt: Any,
    cell: CellConfig,
    dynamic: bool = False,
    smallest: Any = (1, 8, 8),
    largest: Any = (4, 64, 96),
    fp16_mirror: bool = False,
) -> Any:
    """Real descriptors of the cell's tensors, split into inputs and outputs."""
    result = []
    lowest, highest = (shapes_of(cell, fp16_mirror, *size) for size in (smallest, largest))
    for low, high in zip(lowest, highest, strict=True):
        desc = trt.PluginTensorDesc()
        desc.dims = trt.Dims([-1 if a != b else a for a, b in zip(low, high, strict=True)] if dynamic else high)
        if dynamic:
            bounds, desc_inside = trt.DynamicPluginTensorDesc(), desc
            bounds.desc, bounds.min, bounds.opt, bounds.max = desc_inside, trt.Dims(low), trt.Dims(low), trt.Dims(high)
            desc = bounds
        result.append(desc)
    count = len(inputs_of(cell, fp16_mirror=fp16_mirror))
    return result[:count], result[count:]


def test_builds_in_several_threads_keep_their_kernels_apart(trt: Any) -> None:
    """A build that ends in another thread must not take away the kernels that this one's parser needs."""
    cell = CELLS[0]
    here_offered, other_ended = threading.Event(), threading.Event()

    def other() -> None:
        with kernels_offered({cell.label: ()}):
            here_offered.wait(10)
        other_ended.set()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        label = np.frombuffer(cell.label.encode() + b"\0", np.int8)
        fields = trt.PluginFieldCollection([trt.PluginField("cell", label, trt.PluginFieldType.CHAR)])
        with kernels_offered({cell.label: images(cell)}):
            here_offered.set()
            assert other_ended.wait(10)
            plugin = creator(trt, cell.op).create_plugin("node", fields, trt.TensorRTPhase.BUILD)
        assert plugin.images
    finally:
        here_offered.set()
        thread.join(10)


@pytest.mark.parametrize(("cell", "fp16_mirror"), NODES, ids=NODE_IDS)
def test_creator_makes_a_plugin_of_a_node(trt: Any, cell: CellConfig, fp16_mirror: bool) -> None:
    plugin = from_node(trt, cell, fp16_mirror=fp16_mirror)
    assert len(plugin.inputs) == len(inputs_of(cell)) + fp16_mirror
    assert {image.info.kernel for image in plugin.images} == set(kernels_of(cell, fp16_mirror=fp16_mirror))
    assert isinstance(plugin, trt.IPluginV3)
    assert (plugin.plugin_name, plugin.plugin_namespace, plugin.plugin_version) == (cell.op, "stepcell", PLUGIN_VERSION)
    assert plugin.num_outputs == (2 if cell.op == "ConvGRU" else 3)
    for kind in trt.PluginCapabilityType.__members__.values():
        assert plugin.get_capability_interface(kind) is plugin
    assert [field.name for field in creator(trt, cell.op).field_names] == ["cell", "fp16_mirror"]


def test_registering_twice_is_allowed_and_a_taken_name_is_refused(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(trt)
    monkeypatch.setattr("stepcell.plugins.tensorrt.registry._creators", {})
    with pytest.raises(PluginError, match="already has a plugin stepcell::ConvGRU"):
        register(trt)


@pytest.mark.parametrize(
    ("label", "op", "error", "message"),
    [
        (b"gru_x3\0", "ConvGRU", UsageError, "cannot read 'gru_x3'"),
        (b"\xff\xfe\0", "ConvGRU", UsageError, "cannot read"),
        (b"gru_x3_h6_k3x3_soft_float32\0", "ConvGRU", PluginError, "no kernels for gru_x3_h6_k3x3_soft_float32"),
        (None, "ConvLSTM", PluginError, "expected a cell of ConvLSTM, got gru_x3_h5"),
    ],
)
def test_bad_attributes(trt: Any, label: bytes | None, op: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_node(trt, GRU, label, op)


def test_kernels_are_offered_for_one_build_only(trt: Any) -> None:
    from_node(trt, GRU)
    text = np.frombuffer(GRU.label.encode(), np.int8)
    fields = trt.PluginFieldCollection([trt.PluginField("cell", text, trt.PluginFieldType.CHAR)])
    with pytest.raises(PluginError, match=f"there are no kernels for {GRU.label}"):
        creator(trt, "ConvGRU").create_plugin("node", fields, trt.TensorRTPhase.BUILD)


def test_missing_fields(trt: Any) -> None:
    empty = trt.PluginFieldCollection([])
    with pytest.raises(PluginError, match="the node has no attribute 'cell'"):
        creator(trt, "ConvGRU").create_plugin("node", empty, trt.TensorRTPhase.BUILD)
    with pytest.raises(EngineMismatchError, match="the plan holds nothing for it"):
        creator(trt, "ConvGRU").create_plugin("node", empty, trt.TensorRTPhase.RUNTIME)


@pytest.mark.parametrize(("cell", "fp16_mirror"), NODES, ids=NODE_IDS)
def test_types_and_shapes_of_outputs(trt: Any, cell: CellConfig, fp16_mirror: bool) -> None:
    plugin, half = from_node(trt, cell, fp16_mirror=fp16_mirror), trt.DataType.HALF
    state = trt.DataType.FLOAT if cell.state_dtype == "float32" else half
    states = [state] * (1 if cell.op == "ConvGRU" else 2)
    weights = [half] * (len(plugin.inputs) - 1 - len(states))
    assert plugin.get_output_data_types([half, *states, *weights]) == [*states, half]
    # A plugin gets expressions only from a builder. What can be told here: of which inputs they are.
    marked = [trt.DimsExprs(min(place + 1, 8)) for place in range(len(plugin.inputs))]
    ranks = [len(each) for each in plugin.get_output_shapes(marked, [], None)]
    assert ranks == [2, *([3] if cell.op == "ConvLSTM" else []), 2]


@pytest.mark.parametrize(("cell", "fp16_mirror"), NODES, ids=NODE_IDS)
def test_formats_one_per_tensor(cell: CellConfig, fp16_mirror: bool) -> None:
    import tensorrt_rtx as trt  # the lean bindings do not have the type TensorFormat

    register(trt)
    plugin = from_node(trt, cell, fp16_mirror=fp16_mirror)
    wide = cell.state_dtype == "float32"
    expected = dict.fromkeys(["x", "h", "y"], ("HALF", "HWC8"))
    expected |= dict.fromkeys(
        ["state", "cell", "state_out", "cell_out"], ("FLOAT", "LINEAR") if wide else ("HALF", "HWC8")
    )
    inputs, outputs = described(trt, cell, dynamic=True, fp16_mirror=fp16_mirror)
    tensors = (*inputs_of(cell, fp16_mirror=fp16_mirror), *outputs_of(cell))
    for place, tensor in enumerate(tensors):
        accepted = set()
        for dtype in trt.DataType.__members__.values():
            for layout in trt.TensorFormat.__members__.values():
                one = [*inputs, *outputs][place].desc
                one.type, one.format = dtype, layout
                [*inputs, *outputs][place].desc = one
                if plugin.supports_format_combination(place, [*inputs, *outputs], len(inputs)):
                    accepted.add((dtype.name, layout.name))
        wanted = expected.get(tensor.buffer)
        if wanted is None:
            dtype = "FLOAT" if tensor.buffer.endswith((".bias", ".peephole")) else "HALF"
            wanted = (dtype, "LINEAR")
        assert accepted == {wanted}, (tensor.buffer, accepted)


def test_configure_refuses_what_the_kernels_cannot_take(trt: Any) -> None:
    plugin = from_node(trt, GRU)
    plugin.configure_plugin(*described(trt, GRU, dynamic=True))
    with pytest.raises(InputError, match="takes up to 24576 pixels, the sizes allow 5 x 64 x 96") as caught:
        plugin.configure_plugin(*described(trt, GRU, dynamic=True, largest=(5, 64, 96)))
    assert "--maxShapes" in str(caught.value.hint)
    other = CellConfig.from_label("gru_x3_h6_k3x3_soft_float32")
    with pytest.raises(PluginError, match=r"state must have \(batch, 5, height, width\), got \(-1, 6, -1, -1\)"):
        plugin.configure_plugin(*described(trt, other, dynamic=True))
    inputs, outputs = described(trt, GRU, dynamic=True)
    with pytest.raises(PluginError, match="expected 8 inputs and 2 outputs, got 7 and 2"):
        plugin.configure_plugin(inputs[:-1], outputs)
    copied = from_node(trt, GRU, fp16_mirror=True)
    copied.configure_plugin(*described(trt, GRU, dynamic=True, fp16_mirror=True))
    with pytest.raises(PluginError, match="expected 9 inputs and 2 outputs, got 8 and 2"):
        copied.configure_plugin(inputs, outputs)


def test_workspace_of_the_largest_sizes(trt: Any) -> None:
    bounds = {cell: described(trt, cell, dynamic=True) for cell in CELLS}
    sizes = {cell.label: from_node(trt, cell).get_workspace_size(*bounds[cell]) for cell in CELLS}
    copied = described(trt, GRU, dynamic=True, fp16_mirror=True)
    assert from_node(trt, GRU, fp16_mirror=True).get_workspace_size(*copied) == 2 * MAX_PIXELS * 8 * 2  # z, r.h
    assert sizes == {
        "gru_x3_h5_k3x3_soft_float32": 3 * MAX_PIXELS * 8 * 2,  # z, r.h, fp16 mirror of the state
        "lstm-map_x12_h8_k5x1_hard_float16": 0,
        "gru-after_x8_h16_k1x1_soft_float16": 0,
        "lstm_x3_h5_k3x3_soft_float32": MAX_PIXELS * 8 * 2,
    }


def test_partial_sums_of_the_largest_split_kernel_join_the_workspace() -> None:
    plain, pixels = images(GRU), 130
    split = [
        KernelImage(msgspec.structs.replace(each.info, splits=3, partial_bytes=1000 * number), each.cubin)
        for number, each in enumerate(plain)
    ]
    tiles = 3  # of 64 pixels
    expected = -(-4000 * 3 * tiles // 256) * 256
    assert len(split) == 5
    sizes = [workspace_size(GRU, images, pixels, fp16_mirror=False) for images in (plain, split)]
    assert sizes[1] == sizes[0] + expected


def test_tactics_are_the_tiles(trt: Any) -> None:
    plugin = from_node(trt, GRU)
    assert plugin.get_valid_tactics() == [1, 2, 3, 4]  # two tiles of each of two kernels
    assert [[image.info.key for image in images] for images in plugin.tactics] == [
        ["narrow_state-0", "gru_gates-0", "gru_candidate-0"],
        ["narrow_state-0", "gru_gates-0", "gru_candidate-1"],
        ["narrow_state-0", "gru_gates-1", "gru_candidate-0"],
        ["narrow_state-0", "gru_gates-1", "gru_candidate-1"],
    ]
    copied = from_node(trt, GRU, fp16_mirror=True)
    assert [[image.info.kernel for image in images] for images in copied.tactics] == [
        ["gru_gates", "gru_candidate"]
    ] * 4
    assert copied.timing_cache_id != plugin.timing_cache_id
    plugin.set_tactic(3)
    assert plugin.clone().tactic == 3
    plugin.set_tactic(0)
    assert plugin.tactic == 1
    assert plugin.timing_cache_id == from_node(trt, GRU).timing_cache_id
    assert plugin.timing_cache_id != from_node(trt, CELLS[3]).timing_cache_id


@pytest.mark.parametrize(("cell", "fp16_mirror"), NODES, ids=NODE_IDS)
def test_a_plan_carries_the_cell_and_its_code(trt: Any, cell: CellConfig, fp16_mirror: bool) -> None:
    built = from_node(trt, cell, fp16_mirror=fp16_mirror).clone()
    fields = built.get_fields_to_serialize()
    assert built.get_fields_to_serialize() is not fields  # a second asking leaves the first's bytes alone
    loaded = creator(trt, cell.op).create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)
    assert (loaded.cell, loaded.fp16_mirror) == (cell, fp16_mirror)
    assert loaded.images == tuple(
        image for image in images(cell) if not fp16_mirror or image.info.kernel != "narrow_state"
    )
    other = "ConvLSTM" if cell.op == "ConvGRU" else "ConvGRU"
    with pytest.raises(PluginError, match=f"expected a cell of {other}"):
        creator(trt, other).create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)


def test_every_damaged_byte_is_noticed() -> None:
    data = pack_fields(LSTM, images(LSTM, tiles=1), fp16_mirror=False)
    assert read_fields(data) == (LSTM, images(LSTM, tiles=1), False)
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(EngineMismatchError, match="damaged"):
            read_fields(bytes(damaged))
    for size in (0, 10, 32, len(data) - 1):
        with pytest.raises(EngineMismatchError):
            read_fields(data[:size])


def sealed(document: Any) -> bytes:
    body = msgspec.msgpack.encode(document)
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "of schema 1, this stepcell reads 2"),
        ({"cell": "gru_x3"}, "not readable"),
        ({"cell": 7}, "not readable"),
        ({"images": []}, "needs narrow_state"),
        ({"images": images(CELLS[3])}, "needs gru_gates"),
        ({"images": [], "fp16_mirror": True}, "needs gru_gates"),
        ({"fp16_mirror": 7}, "not readable"),
        ({"cell": "gru_x3_h5_k5x5_soft_float32"}, "mixed up: kernel gru_gates of gru_x3_h5_k3x3_soft_float32"),
    ],
)
def test_unusable_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatchError, match=message) as caught:
        read_fields(sealed({"schema": 2, "cell": GRU.label, "fp16_mirror": False, "images": images(GRU)} | change))
    assert "stepcell build" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": arguments_of("gru_candidate")}, "of another interface"),
        ({"schema": 9}, "of another interface"),
        ({"sha256": "0"}, "code of gru_gates"),
    ],
)
def test_unusable_images(change: dict[str, Any], message: str) -> None:
    first, *others = (each for each in images(GRU) if each.info.kernel == "gru_gates")
    broken = KernelImage(msgspec.structs.replace(first.info, **change), first.cubin)
    rest = [each for each in images(GRU) if each.info.kernel != "gru_gates"]
    with pytest.raises(EngineMismatchError, match=message):
        read_fields(pack_fields(GRU, [broken, *others, *rest], fp16_mirror=False))


def test_interface_digest_follows_the_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = interface_digest()
    assert before == interface_digest()
    with monkeypatch.context() as changed:
        changed.setattr("stepcell.plugins.tensorrt.fields._SCHEMA", 3)
        assert interface_digest() != before
    assert interface_digest() == before
    with monkeypatch.context() as changed:  # a node whose fp16 mirror stood elsewhere
        moved = lambda cell, fp16_mirror: inputs_of(cell, fp16_mirror=fp16_mirror)[:: -1 if fp16_mirror else 1]  # noqa: E731
        changed.setattr("stepcell.plugins.tensorrt.fields.inputs_of", moved)
        assert interface_digest() != before
    monkeypatch.setitem(PARAMETERS, "gru_gates", PARAMETERS["gru_gates"][1:])
    assert interface_digest() != before


def test_code_that_no_driver_takes(trt: Any) -> None:
    plugin = from_node(trt, GRU)
    inputs, outputs = described(trt, GRU)
    with pytest.raises((StepcellError, RuntimeError)):  # no driver here, or one that refuses these bytes
        plugin.on_shape_change(inputs, outputs)
    plugin.destroy()
