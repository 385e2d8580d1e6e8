"""Split K: several programs share the K loop of a tile, and the last one to finish completes the tile.

Each program writes its partial sums, then increments the counter of the tile. The program that finds the counter
complete adds the sums, always in the order of the splits, so the result does not depend on which one was last.

A grid has the splits as its third axis. `partials` is float32 (tile, split, BM, WIDTH) and may hold
anything before a launch; `arrivals` is int32 (tile), zero before a launch and zero after it.
"""

from __future__ import annotations

import triton.language as tl

from stepcell.plugins.kernels.triton.language import jit

__all__ = ["arrived_last", "store_partial", "sum_partials"]


@jit
def _tile() -> tl.tensor:
    return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@jit
def _offset(BM: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """(BM, N) offsets of the columns FIRST ... FIRST + N - 1 of a program's partial sums."""
    return tl.arange(0, BM)[:, None] * WIDTH + FIRST + tl.arange(0, N)[None, :]


@jit
def store_partial(
    acc: tl.tensor, partials: tl.tensor, FIRST: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
) -> None:
    """Write this program's partial accumulator (BM, N)."""
    BM: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    mine = (_tile() * SPLITS + tl.program_id(2)).to(tl.int64) * (BM * WIDTH)
    tl.store(partials + mine + _offset(BM, N, FIRST, WIDTH), acc)


@jit
def arrived_last(arrivals: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """Increment the tile's counter; returns whether this program is the last, and then resets the counter."""
    tl.debug_barrier()  # one thread counts for all, whose sums must have been written
    last = tl.atomic_add(arrivals + _tile(), 1, sem="acq_rel") == SPLITS - 1
    tl.store(arrivals + _tile(), 0, mask=last)
    return last


@jit
def sum_partials(
    acc: tl.tensor, partials: tl.tensor, FIRST: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
) -> tl.tensor:
    """The complete accumulator, of which `acc` is this program's part."""
    BM: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    first = (_tile() * SPLITS).to(tl.int64) * (BM * WIDTH)
    offset = _offset(BM, N, FIRST, WIDTH)
    whole = tl.full((BM, N), 0.0, tl.float32)
    # num_programs(2) is SPLITS, but unknown to the assembler, which would otherwise load everything at once.
    for split in tl.range(tl.num_programs(2), num_stages=1):
        whole += tl.load(partials + first + split * (BM * WIDTH) + offset)
    return whole
