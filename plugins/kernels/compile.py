"""Ahead-of-time compiler of the kernels: Triton and its assembler, for GPUs that need not be present.

Only this module needs Triton. The result is machine code for one compute capability (a cubin) and not PTX,
because an older driver on a device cannot translate the PTX of a newer Triton.
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
    """Raise for a compute capability that the kernels are not compiled for.

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
    """Digest of everything in this package that decides the machine code: Triton sources, parameters, options."""
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
    """The part of a cell's label that a kernel depends on; identifies the cell in a kernel image."""
    return f"h{cell.hidden}" if kernel == "narrow_state" else cell.label


def arguments_of(kernel: str) -> tuple[Argument, ...]:
    """Layout of the kernel's argument block: parameters in order, each aligned to its size.

    The last two are pointers to scratch memory that Triton adds and these kernels do not use.
    """
    entries = [(p.name, p.buffer, 4 if p.dtype == "int32" else 8) for p in PARAMETERS[kernel]]
    arguments, end = [], 0
    for name, buffer, size in [*entries, ("scratch0", "", 8), ("scratch1", "", 8)]:
        offset = -(-end // size) * size
        arguments.append(Argument(name, buffer, offset, size))
        end = offset + size
    return tuple(arguments)


def compile_kernel(kernel: str, cell: CellConfig, tile: Tile, capability: str) -> KernelImage:
    """Compile one kernel; takes about a second and needs no GPU.

    Raises:
        UsageError: the kernels are not compiled for this compute capability.
        MissingDependencyError: Triton is not installed.
        BuildError: Triton or its assembler failed.
    """
    check_capability(capability)
    triton = require("triton", extra="kernels", purpose="compiling the kernels")
    # By default the assembler sometimes spills a few values to the stack to raise occupancy. If it did, compile
    # again with the register limit lifted.
    for registers_limit in (None, 255):
        compiled = _compiled(triton, kernel, cell, tile, int(capability.replace(".", "")), maxnreg=registers_limit)
        metadata, cubin = compiled.metadata, compiled.asm["cubin"]
        registers, tensor_cores, spills = _resources(triton, cubin)
        if not spills:
            break
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{kernel} for {capability}: Triton {triton.__version__} needs scratch memory for it")
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
        # gru_gates never overlaps its predecessor: it reads x at once, which the previous layer may still write.
        overlaps=tile.overlap and kernel == "gru_candidate",
    )
    return KernelImage(info, cubin)


@dataclass(frozen=True)
class Ptx:
    """A kernel as PTX, which the driver of a device translates to machine code.

    Attributes:
        entry: name of the function.
        text: its parameters are those of signature.py, then two scratch pointers of Triton.
        threads: per program.
        shared_bytes: dynamic shared memory per program.
    """

    entry: str
    text: str
    threads: int
    shared_bytes: int


def compile_ptx(kernel: str, cell: CellConfig, tile: Tile, capability: str, *, ptx_version: int | None = None) -> Ptx:
    """Compile one kernel to PTX; takes about a second and needs no GPU.

    Args:
        ptx_version: newest PTX version that the driver accepts, times ten: 84 is PTX 8.4 (CUDA 12.4);
            None: the version of Triton's assembler.

    Raises:
        UsageError: the kernels are not compiled for this compute capability.
        MissingDependencyError: Triton is not installed.
        BuildError: Triton or its assembler failed, for example because the GPU needs a newer PTX.
    """
    check_capability(capability)
    triton = require("triton", extra="kernels", purpose="compiling the kernels")
    sm = int(capability.replace(".", ""))
    compiled = _compiled(triton, kernel, cell, tile, sm)
    found = re.search(r"^\.version (\d+)\.(\d+)$", compiled.asm["ptx"], re.MULTILINE)
    if found is None:
        raise BuildError(f"{kernel}: the PTX of this Triton version does not have the expected form")
    if ptx_version is not None and int(found[1] + found[2]) > ptx_version:
        compiled = _compiled(triton, kernel, cell, tile, sm, ptx_version=ptx_version)
    metadata = compiled.metadata
    return Ptx(metadata.name, compiled.asm["ptx"], 32 * metadata.num_warps, metadata.shared)


def _widest(cell: CellConfig) -> int:
    """Channels of the widest map that a kernel of the cell reads or writes."""
    pre = padded(cell.gate_count * cell.hidden) if cell.pre else 0
    return max(padded(cell.inputs), padded(cell.hidden), pre)


def _compiled(triton: ModuleType, kernel: str, cell: CellConfig, tile: Tile, sm: int, **more: int | None) -> Any:
    """Run Triton; `more` are additional compiler options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.compilation.disable_line_info = True  # saves a third of the size and keeps paths out of the code
    function = kernel_function(kernel)
    values = constants(kernel, cell, tile, f"{sm // 10}.{sm % 10}")
    dtypes = {p.name: _TRITON_TYPES[pointer_dtype(p, cell)] for p in PARAMETERS[kernel]}
    source = ASTSource(
        fn=function,
        signature=dtypes | dict.fromkeys(values, "constexpr"),
        constexprs={(len(dtypes) + i,): value for i, value in enumerate(values.values())},
        # Triton emits 16-byte copies to shared memory only for addresses known to be multiples of 16.
        attrs={(i,): [["tt.divisibility", 16]] for i, dtype in enumerate(dtypes.values()) if dtype != "i32"},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True, **more}
    try:
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # Triton raises many exception types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(
            f"{kernel} of {cell.label}, tile {tile.label}, for {sm / 10}: Triton {triton.__version__} failed ({reason})"
        ) from error


def _resources(triton: ModuleType, cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, tensor-core instructions and stack accesses, from cuobjdump."""
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
