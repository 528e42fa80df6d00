"""Memory for what every step reads from end to end: pages of 2 MB where the system has them.

A processor reads ahead within a page: in pages of 4 KB it stops and looks up the next one every 64 lines. The kernels
ask for lines ahead themselves, so that 2 to 5 % of a step over eight rows is what is left to gain.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

_PAGE, _CHUNK, _LINE = 2 << 20, 32 << 20, 64
_lock = threading.Lock()
_free = memoryview(b"")  # what is left of the newest chunk; a chunk lives as long as a tensor in it


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor of the CPU, with others of its size in huge pages."""
    if not tensor.numel():
        return tensor.contiguous()
    room = _take(tensor.numel() * tensor.element_size())
    return torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def mapped(size: int) -> mmap.mmap:
    """Zeros in a mapping of their own, whose pages are taken as they are written."""
    # private: most systems give shared memory, which is Python's default, no huge pages
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **flags)


def _take(size: int) -> memoryview:
    global _free
    whole = -(-size // _LINE) * _LINE
    with _lock:
        if len(_free) < whole:
            _free = _chunk(max(whole, _CHUNK))
        found, _free = _free[:size], _free[whole:]
    return found


def _chunk(size: int) -> memoryview:
    memory = mapped(size + _PAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[start : start + size]
