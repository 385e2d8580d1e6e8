"""Typical cells: what `stepcell kernels compile` compiles when no cell is named, and what the report covers."""

from __future__ import annotations

from stepcell.plugins.kernels.cell_config import CellConfig

__all__ = ["TYPICAL"]

# Each with the pixels (batch * height * width) of the network that it is taken from.
TYPICAL = tuple(
    (CellConfig.from_label(label), pixels)
    for label, pixels in [
        ("gru_x32_h64_k3x3_soft_float32", 64 * 64),
        ("gru_x64_h64_k3x3_soft_float32", 128 * 128),
        ("gru_x64_h64_k3x3_soft_float16", 128 * 128),
        ("gru_x128_h128_k1x5_soft_float16_pre", 55 * 128),  # RAFT
        ("gru_x128_h128_k5x1_soft_float32", 55 * 128),
        ("gru_x16_h16_k3x3_soft_float32", 540 * 960),  # Robust Video Matting
        ("gru_x20_h20_k3x3_soft_float32", 270 * 480),
        ("gru_x256_h256_k3x3_soft_float32", 20 * 15),  # event detection
        ("gru-after_x64_h64_k3x3_soft_float32", 128 * 128),
        ("lstm_x64_h64_k3x3_soft_float32", 128 * 128),
        ("lstm_x64_h64_k1x1_soft_float32", 64 * 80),  # RVT
        ("lstm_x256_h256_k3x3_soft_float32", 20 * 15),
        ("lstm-map_x8_h64_k3x3_soft_float32", 64 * 64),  # precipitation nowcasting
    ]
)
