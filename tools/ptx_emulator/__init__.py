"""PTX emulator: runs the compiled kernels without a GPU, from the PTX that Triton generates.

Triton's interpreter checks the source; the emulator checks the generated code: layouts of tensor-core operands,
asynchronous copies to shared memory, barriers, vector accesses and the packed arguments. All threads of a program run
in lockstep, so a race cannot produce a wrong value here; races are detected by rules instead (shared.py), as are
accesses that are out of bounds, misaligned, to a copy that was not waited for, or to what another program has just
written (memory.py).

program.py parses the text, cta.py runs one program, scalar.py and tensor_core.py implement the instructions, driver.py
is a fake CUDA driver that runs launches. The semantics are those of NVIDIA's PTX ISA. Not modelled: what the assembler
and the hardware do with the text, rounding within a tensor core, memory proxies, time.
"""
