"""Triton sources of the kernels. Only kernels/compile.py imports them."""
