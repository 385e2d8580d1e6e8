"""Emulator of the PTX that Triton generates for the gate kernels; see README.md in this folder."""
