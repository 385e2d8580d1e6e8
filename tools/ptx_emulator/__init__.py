"""Runs the compiled kernels without a GPU: an emulator of the PTX that Triton makes of them.

Triton's interpreter shows that the source is right; this shows it of the code: layouts of tensor-core
operands, copies to shared memory in flight, barriers, vector accesses and the packed arguments. All
threads of a program go in step, so a race cannot give a wrong value here; it is found by rule instead
(shared.py), and so is an access outside a buffer, one that is not aligned, one to a copy that was not waited
for, and one to what another program has just written (memory.py).

program.py reads the text, cta.py runs one program, scalar.py and tensor_core.py know the instructions,
driver.py is a fake CUDA driver that runs launches. Semantics are those of NVIDIA's PTX ISA. Not modelled: what the assembler
and the hardware make of the text, rounding within a tensor core, memory proxies, time.
"""
