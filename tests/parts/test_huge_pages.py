"""Copies in huge pages are copies, and live as long as anybody holds them."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from gossamer.parts import huge_pages
from gossamer.parts.huge_pages import in_huge_pages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int8])
def test_a_copy_is_contiguous_and_equal(dtype: torch.dtype) -> None:
    wanted = torch.arange(5 * 7 * 3).remainder(100).to(dtype).view(5, 7, 3).transpose(0, 2)
    found = in_huge_pages(wanted)
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0
    assert torch.equal(found, wanted)
    assert in_huge_pages(torch.empty(0, 3)).shape == (0, 3)


def test_copies_do_not_meet_and_outlive_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_free", memoryview(b""))
    monkeypatch.setattr(huge_pages, "_CHUNK", 4096)
    wanted = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (1, 700, 63, 4000, 9000, 64)]
    found = [in_huge_pages(tensor) for tensor in wanted]
    del found[1], wanted[1]
    gc.collect()
    assert all(map(torch.equal, found, wanted))


def test_a_system_without_them_gives_ordinary_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages, "_free", memoryview(b""))
    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert torch.equal(in_huge_pages(torch.ones(3)), torch.ones(3))


def test_the_pages_are_huge_where_the_system_has_them() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("a system without huge pages")
    before = _huge()
    kept = in_huge_pages(torch.ones(64 << 20, dtype=torch.uint8))
    assert _huge() - before >= kept.numel() // 2


def _huge() -> int:
    """Bytes of this process in huge pages."""
    found = re.findall(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return 1024 * sum(map(int, found))
