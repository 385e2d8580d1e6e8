"""Compile kernels for a GPU that need not be here: Triton and its own assembler do it on any machine.

Triton is needed for this and for nothing else. What comes out is machine code for one compute
capability (a cubin), not PTX: an older driver on a device cannot translate a newer PTX.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stepcell.errors import BuildError, UsageError
from stepcell.optional_imports import require
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.image import SCHEMA, Argument, ImageInfo, KernelImage
from stepcell.plugins.kernels.signature import PARAMETERS, SOURCES, constants, pointer_dtype
from stepcell.plugins.kernels.tiles import Tile, partial_bytes

__all__ = [
    "CAPABILITIES",
    "Ptx",
    "arguments_of",
    "cell_word",
    "check_capability",
    "compile_kernel",
    "compile_ptx",
    "kernel_function",
    "source_digest",
]

CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0")
_TRITON_TYPES = {"float16": "*fp16", "float32": "*fp32", "count": "*i32", "int32": "i32"}


def check_capability(capability: str) -> None:
    """Refuse a GPU that these kernels are not compiled for.

    Raises:
        UsageError: it is not in CAPABILITIES.
    """
    if capability == "7.5":
        raise UsageError(
            "compute capability 7.5: Triton emits no tensor-core instructions for it, the kernels would be slow",
            hint="such a GPU runs the cell as TensorRT's own layers: build with --plugin off",
        )
    if capability not in CAPABILITIES:
        raise UsageError(f"compute capability: expected one of {', '.join(CAPABILITIES)}, got {capability!r}")


def source_digest() -> str:
    """Names the kernels' source text, the order of their parameters and the options they are compiled with."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted((folder / "triton").glob("*.py")), folder / "signature.py", folder / "compile.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _image_key(kernel: str, values: dict[str, int | bool], tile: Tile, capability: str, triton: str) -> str:
    fixed = (SCHEMA, source_digest(), kernel, sorted(values.items()), tile, capability, triton)
    return f"{kernel}-sm{capability.replace('.', '')}-{hashlib.sha256(repr(fixed).encode()).hexdigest()[:16]}"


def kernel_function(kernel: str) -> Any:
    """The Triton function of a kernel."""
    return getattr(importlib.import_module(f"stepcell.plugins.kernels.triton.{SOURCES[kernel]}"), kernel)


def cell_word(kernel: str, cell: CellConfig) -> str:
    """What of a cell a kernel depends on, as images call it."""
    return f"h{cell.hidden}" if kernel == "narrow_state" else cell.label


def arguments_of(kernel: str) -> tuple[Argument, ...]:
    """The kernel's parameters as the GPU gets them: in order, each aligned to its size.

    Triton adds two pointers for scratch memory, which these kernels do not use.
    """
    entries = [(p.name, p.buffer, 4 if p.dtype == "int32" else 8) for p in PARAMETERS[kernel]]
    arguments, end = [], 0
    for name, buffer, size in [*entries, ("scratch0", "", 8), ("scratch1", "", 8)]:
        offset = -(-end // size) * size
        arguments.append(Argument(name, buffer, offset, size))
        end = offset + size
    return tuple(arguments)


def compile_kernel(kernel: str, cell: CellConfig, tile: Tile, capability: str) -> KernelImage:
    """Compile one kernel; takes a second or so, and no GPU.

    Raises:
        UsageError: a compute capability that is not compiled for.
        MissingDependencyError: Triton is not installed.
        BuildError: Triton or its assembler failed.
    """
    check_capability(capability)
    triton = require("triton", extra="kernels", purpose="compiling the kernels")
    # Left alone, the assembler sometimes keeps a few values on the stack, so that more programs fit side
    # by side; then it is told to take the registers it needs instead.
    for registers_limit in (None, 255):
        compiled = _compiled(triton, kernel, cell, tile, int(capability.replace(".", "")), maxnreg=registers_limit)
        metadata, cubin = compiled.metadata, compiled.asm["cubin"]
        registers, tensor_cores, spills = _resources(triton, cubin)
        if not spills:
            break
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{kernel} for {capability}: Triton {triton.__version__} wants scratch memory for it")
    info = ImageInfo(
        schema=SCHEMA,
        key=_image_key(kernel, constants(kernel, cell, tile, capability), tile, capability, triton.__version__),
        source=source_digest(),
        kernel=kernel,
        cell=cell_word(kernel, cell),
        tile=tile.label,
        capability=capability,
        entry=metadata.name,
        warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=registers,
        tensor_core_instructions=tensor_cores,
        spill_instructions=spills,
        grid_pixels=tile.pixels,
        grid_channels=-(-padded(cell.hidden) // tile.channels),
        max_pixels=(2**31 - 1) // _widest(cell) - tile.pixels,
        arguments=arguments_of(kernel),
        sha256=hashlib.sha256(cubin).hexdigest(),
        triton=triton.__version__,
        splits=tile.splits,
        partial_bytes=partial_bytes(kernel, tile),
        # Never gru_gates: it reads x from the start, which the layer before it may still be writing.
        overlaps=tile.overlap and kernel == "gru_candidate",
    )
    return KernelImage(info, cubin)


@dataclass(frozen=True)
class Ptx:
    """A kernel in NVIDIA's assembly language, which the driver of a device translates.

    Attributes:
        entry: name of the function.
        text: its parameters are those of signature.py, then Triton's two for scratch memory.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
    """

    entry: str
    text: str
    threads: int
    shared_bytes: int


def compile_ptx(kernel: str, cell: CellConfig, tile: Tile, capability: str, *, ptx_version: int | None = None) -> Ptx:
    """One kernel as PTX, for those that cannot take machine code; takes a second or so, and no GPU.

    Args:
        ptx_version: the newest that will be understood, ten times the version: 84 for 8.4, CUDA
            12.4; None: that of Triton's assembler.

    Raises:
        UsageError: a compute capability that is not compiled for.
        MissingDependencyError: Triton is not installed.
        BuildError: Triton or its assembler failed, for one because the GPU needs a newer PTX.
    """
    check_capability(capability)
    triton = require("triton", extra="kernels", purpose="compiling the kernels")
    sm = int(capability.replace(".", ""))
    compiled = _compiled(triton, kernel, cell, tile, sm)
    found = re.search(r"^\.version (\d+)\.(\d+)$", compiled.asm["ptx"], re.MULTILINE)
    if found is None:
        raise BuildError(f"{kernel}: this Triton writes PTX of another form than expected")
    if ptx_version is not None and int(found[1] + found[2]) > ptx_version:
        compiled = _compiled(triton, kernel, cell, tile, sm, ptx_version=ptx_version)
    metadata = compiled.metadata
    return Ptx(metadata.name, compiled.asm["ptx"], 32 * metadata.num_warps, metadata.shared)


def _widest(cell: CellConfig) -> int:
    """Channels of the widest map that a kernel of the cell reads or writes."""
    pre = padded(cell.gate_count * cell.hidden) if cell.pre else 0
    return max(padded(cell.inputs), padded(cell.hidden), pre)


def _compiled(triton: ModuleType, kernel: str, cell: CellConfig, tile: Tile, sm: int, **more: int | None) -> Any:
    """Triton's result; `more` are options of Triton's."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.compilation.disable_line_info = True  # a third of the size, and no paths in the code
    function = kernel_function(kernel)
    values = constants(kernel, cell, tile, f"{sm // 10}.{sm % 10}")
    dtypes = {p.name: _TRITON_TYPES[pointer_dtype(p, cell)] for p in PARAMETERS[kernel]}
    source = ASTSource(
        fn=function,
        signature=dtypes | dict.fromkeys(values, "constexpr"),
        constexprs={(len(dtypes) + i,): value for i, value in enumerate(values.values())},
        # Only for addresses known to be multiples of 16 are 16-byte copies to shared memory made.
        attrs={(i,): [["tt.divisibility", 16]] for i, dtype in enumerate(dtypes.values()) if dtype != "i32"},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True, **more}
    try:
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # Triton raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(
            f"{kernel} of {cell.label}, tile {tile.label}, for {sm / 10}: Triton {triton.__version__} failed ({reason})"
        ) from error


def _resources(triton: ModuleType, cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, tensor-core instructions and stack accesses, read from the code by NVIDIA's tool."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    registers = re.search(r"REG:(\d+)", text)
    if registers is None or "EXIT" not in text:
        raise BuildError("cuobjdump: cannot read the compiled kernel")
    counts = [len(re.findall(rf"\b(?:{names})\b", text)) for names in (r"HMMA|HGMMA|UTC\w*MMA", "STL|LDL")]
    return int(registers[1]), counts[0], counts[1]
