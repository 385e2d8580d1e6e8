"""Arguments that reach the CUDA driver, through the real cuda-bindings and a driver that records its calls."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stepcell.plugins.kernels.compile import arguments_of
from stepcell.plugins.kernels.image import SCHEMA, ImageInfo, KernelImage, write_image
from stepcell.plugins.kernels.launcher import arguments_format, driver_ptx_version
from stepcell.plugins.kernels.signature import PARAMETERS
from tools.fake_driver import FakeDriver

CUBIN = b"\x7fELF"
START = """
import sys
from pathlib import Path
from stepcell.errors import StepcellError
from stepcell.plugins.kernels.image import read_image
from stepcell.plugins.kernels.launcher import Launcher

launcher = Launcher(read_image(Path(sys.argv[1])), device=3)
"""
LAUNCH = """
launcher.prepare(42)
print(*launcher.buffers)
addresses = [256 * (i + 1) for i in range(len(launcher.buffers))]
launcher.launch(0x77, addresses, 2, 3, 7)
launcher.launch(0x78, [0, *addresses[1:]], 1, 8, 8)
odd = [8, *addresses[1:]]
for stream, where, size in [(0xbad0, addresses, (1, 1, 1)), (0, odd, (1, 1, 1)), (0, addresses, (9, 9, 9))]:
    try:
        launcher.launch(stream, where, *size)
    except StepcellError as error:
        print(type(error).__name__, error.message)
launcher.close()
launcher.close()
"""
SPLIT = """
addresses = [0] * len(launcher.buffers)
try:
    launcher.launch(0, addresses, 1, 1, 1)
except StepcellError as error:
    print(error.message)
for height in (2, 6, 8, 4):
    launcher.prepare(8 * height)
    launcher.launch(0, addresses, 1, height, 8)
launcher.close()
"""


def image(kernel: str, splits: int = 1, overlaps: bool = False) -> KernelImage:
    info = ImageInfo(
        schema=SCHEMA,
        key=kernel,
        source="",
        kernel=kernel,
        cell="",
        tile="",
        capability="8.7",
        entry=f"{kernel}_entry",
        warps=4,
        shared_bytes=50000,
        registers=0,
        tensor_core_instructions=0,
        spill_instructions=0,
        grid_pixels=32,
        grid_channels=5,
        max_pixels=100,
        arguments=arguments_of(kernel),
        sha256=hashlib.sha256(CUBIN).hexdigest(),
        triton="",
        splits=splits,
        overlaps=overlaps,
    )
    return KernelImage(info, CUBIN)


@pytest.fixture(scope="module")
def recording_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a libcuda.so.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[2] / "fakes" / "recording_driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def run(script: str, made: KernelImage, recording_driver: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What a script prints about a launcher, and what the driver wrote down."""
    path = write_image(made, folder).with_suffix(".json")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(recording_driver),
        "FAKE_LOG": str(folder / "log"),
        "FAKE_SIZES": "".join(str(argument.size) for argument in made.info.arguments),
    }
    command = [sys.executable, "-c", START + script, str(path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines(), (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("kernel", "overlaps"), [*((kernel, False) for kernel in sorted(PARAMETERS)), ("gru_candidate", True)]
)
def test_a_launch_hands_over_grid_block_and_every_argument(
    kernel: str, overlaps: bool, recording_driver: Path, tmp_path: Path
) -> None:
    (buffers, *errors), log = run(LAUNCH, image(kernel, overlaps=overlaps), recording_driver, tmp_path)
    attribute = "with 6 = 1: " if overlaps else ""  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    pointers = [p.buffer for p in PARAMETERS[kernel] if p.dtype != "int32" and p.name != "arrivals"]
    assert buffers.split() == pointers
    addresses = [256 * (i + 1) for i in range(len(pointers))]
    arrivals = [] if kernel == "narrow_state" else [0]

    def launch(stream: str, programs: int, values: list[int]) -> str:
        numbers = " ".join(map(str, [*values[:-3], *arrivals, *values[-3:], 0, 0]))
        sizes = f"grid {programs} 5 1 block 128 1 1 shared 50000"
        return f"{attribute}launch 0x2222 {sizes} stream {stream} extra 0: {numbers}"

    assert (
        log
        == [
            "load ELF",
            f"kernel {kernel}_entry of 0x1111",
            "attribute 8 = 50000 of 0x2222 on 3",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            launch("0x77", 2, [*addresses, 3, 7, 42]),
            launch("0x78", 2, [0, *addresses[1:], 8, 8, 64]),
            launch("0xbad0", 1, [*addresses, 1, 1, 1]),
            "unload 0x1111",
        ]
    )
    assert errors == [
        "DeviceError CUDA: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
        f"InputError {kernel}: addresses must be multiples of 16, got others for {pointers[0]}",
        f"InputError {kernel}: takes 1 to 100 pixels, got 9 x 9 x 9",
    ]


def test_a_split_kernel_has_counters_of_its_own_that_grow_and_stay(recording_driver: Path, tmp_path: Path) -> None:
    """A captured graph may hold the address of earlier ones, so they are freed at the end only."""
    printed, log = run(SPLIT, image("gru_gates", splits=4), recording_driver, tmp_path)
    assert printed == ["gru_gates: was not prepared for 1 x 1 x 1 pixels"]
    launches = [line.split(": ") for line in log if line.startswith("launch")]
    assert [line.split(" block")[0] for line, _ in launches] == [f"launch 0x2222 grid {n} 5 4" for n in (1, 2, 2, 1)]
    place = [p.name for p in PARAMETERS["gru_gates"]].index("arrivals")
    assert [int(values.split()[place]) for _, values in launches] == [0x30000, 0x40000, 0x40000, 0x40000]
    assert [line for line in log if line.split()[0] in ("alloc", "set", "wait", "free", "unload")] == [
        "alloc 20 at 0x30000",  # 16 pixels in tiles of 32, 5 tiles of channels
        "set 0x30000 to 0, 20 times",
        "wait for 0x77777",
        "alloc 40 at 0x40000",
        "set 0x40000 to 0, 40 times",
        "wait for 0x77777",
        "free 0x30000",
        "free 0x40000",
        "unload 0x1111",
    ]


def test_the_block_has_gaps_where_a_pointer_follows_a_number() -> None:
    assert arguments_format(arguments_of("narrow_state")) == "<QQiii4xQQ"


@pytest.mark.parametrize(
    ("cuda", "ptx"), [(11080, 78), (12040, 84), (12050, 85), (12060, 85), (12080, 87), (12090, 88), (13000, 90)]
)
def test_the_newest_ptx_of_a_driver(cuda: int, ptx: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's table of PTX versions, by CUDA version."""
    driver = FakeDriver()
    driver.version = cuda
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert driver_ptx_version() == ptx
