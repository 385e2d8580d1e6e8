"""Configuration of a cell: everything that is fixed when its kernels are compiled, and its label."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from stepcell.errors import UsageError
from stepcell.ops import GATES, OPS, Gates, OpName, OpVariant

__all__ = ["WORDS", "CellConfig", "padded"]

# First word of a label, by op and variant.
WORDS: dict[tuple[OpName, OpVariant], str] = {
    ("ConvGRU", "before"): "gru",
    ("ConvGRU", "after"): "gru-after",
    ("ConvLSTM", "none"): "lstm",
    ("ConvLSTM", "channel"): "lstm-channel",
    ("ConvLSTM", "map"): "lstm-map",
}
_LABEL = re.compile(
    rf"(?P<op>{'|'.join(WORDS.values())})_x(?P<inputs>\d+)_h(?P<hidden>\d+)_k(?P<height>\d+)x(?P<width>\d+)"
    rf"_(?P<gates>{'|'.join(GATES)})_(?P<state>float32|float16)(?P<pre>_pre)?"
)


def padded(channels: int) -> int:
    """Channels rounded up to a multiple of 8: the channel stride of a float16 map (TensorRT's kHWC8)."""
    return (channels + 7) // 8 * 8


@dataclass(frozen=True)
class CellConfig:
    """One ConvGRU or ConvLSTM (docs/op-contract.md).

    Attributes:
        op: "ConvGRU" or "ConvLSTM".
        inputs: channels of x; 0: x contributes through the pre-activations only.
        hidden: channels of the state.
        kernel: height and width of the convolution, odd.
        variant: variant of the op, see `stepcell.ops.Op`.
        gates: "soft" or "hard" activations.
        state_dtype: "float32", laid out (B, C, H, W), or "float16", laid out (B, H, W, padded C).
        pre: float16 pre-activations (B, H, W, padded gates * C) are added before the activations.

    Raises:
        UsageError: a field breaks one of these rules.
    """

    op: OpName
    inputs: int
    hidden: int
    kernel: tuple[int, int]
    variant: OpVariant
    gates: Gates = "soft"
    state_dtype: Literal["float32", "float16"] = "float32"
    pre: bool = False

    def __post_init__(self) -> None:
        if (self.op, self.variant) not in WORDS:
            raise UsageError(f"kernel cell: {self.op} has no variant {self.variant!r}")
        if any(size < 1 or size % 2 == 0 for size in self.kernel):
            raise UsageError(f"kernel cell: the kernel must have odd sizes, got {self.kernel[0]}x{self.kernel[1]}")
        if self.hidden < 1 or self.inputs < 0 or (self.inputs == 0 and not self.pre):
            raise UsageError(
                f"kernel cell: needs inputs (or pre-activations) and hidden channels, "
                f"got {self.inputs} and {self.hidden}"
            )

    @property
    def gate_count(self) -> int:
        """Number of gates: 3 for ConvGRU, 4 for ConvLSTM."""
        return len(OPS[self.op].gates)

    @property
    def label(self) -> str:
        """Text form, read by `from_label`, such as gru_x32_h64_k3x3_soft_float32."""
        height, width = self.kernel
        word = f"{WORDS[self.op, self.variant]}_x{self.inputs}_h{self.hidden}_k{height}x{width}"
        return f"{word}_{self.gates}_{self.state_dtype}" + ("_pre" if self.pre else "")

    @classmethod
    def from_label(cls, label: str) -> CellConfig:
        """Parse a label.

        Raises:
            UsageError: the text is not a label.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise UsageError(
                f"kernel cell: cannot read {label!r}",
                hint=f"expected one of {', '.join(WORDS.values())}, then sizes, gates and state dtype, such as "
                "gru_x32_h64_k3x3_soft_float32",
            )
        op, variant = next(key for key, word in WORDS.items() if word == match["op"])
        return cls(
            op=op,
            inputs=int(match["inputs"]),
            hidden=int(match["hidden"]),
            kernel=(int(match["height"]), int(match["width"])),
            variant=variant,
            gates=cast("Gates", match["gates"]),
            state_dtype=cast('Literal["float32", "float16"]', match["state"]),
            pre=match["pre"] is not None,
        )

    def with_state(self, dtype: Literal["float32", "float16"]) -> CellConfig:
        """The same cell with another state dtype."""
        return replace(self, state_dtype=dtype)
