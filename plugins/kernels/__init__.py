"""The fused ConvGRU and ConvLSTM step as GPU kernels.

Triton sources: conv.py, split.py, epilogue.py, gru.py, lstm.py, narrow.py; only compile.py imports them.
Everything else is plain Python and numpy: cell.py says what is computed, signature.py what each
kernel takes, packing.py how weights are laid out, tiles.py how work is cut, image.py what a compiled
kernel is. docs/plugin.md explains how a device gets its kernels.
"""
