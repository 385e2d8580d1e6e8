"""The fused ConvGRU and ConvLSTM step as GPU kernels.

triton/ has the sources, which only compile.py imports. The rest is plain Python and numpy: cell_config.py (what is
computed), signature.py (parameters of each kernel), packing.py (layout of weights), tiles.py (division of the work),
image.py and store.py (compiled kernels on disk), launcher.py (loading and launching). docs/plugin.md explains how a
device gets its kernels.
"""
