"""Dynamic sizes of a module's inputs: which axes they are."""

from __future__ import annotations

import pytest

from stepcell.exporter.from_module.sizes import symbolic_shapes


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((0, 1, 2, 3), ("batch", 3, "height", "width")),
        ((0, 2, 3, 1), ("batch", "height", "width", 3)),
    ],
    ids=["NCHW", "NHWC"],
)
def test_height_and_width_are_where_the_layout_has_them(
    order: tuple[int, ...], expected: tuple[int | str, ...]
) -> None:
    def measure(shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        batch, channels, height, width = (shapes["x"][order.index(axis)] for axis in range(4))
        assert channels == 3
        return [(batch, 8, height // 4, width // 4)]

    example = tuple((1, 3, 48, 64)[axis] for axis in order)
    found = symbolic_shapes({"x": example}, ["batch", "height", "width"], measure, 1)  # type: ignore[arg-type]
    assert found.inputs == {"x": expected}
    assert found.batch_axes == [0]
    assert found.measured == [("batch", 8, "height // 4", "width // 4")]
