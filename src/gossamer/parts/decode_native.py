"""The compiled kernels of the decoding runner: built on first use, kept in the cache, called through ctypes.

``decode_kernels.cpp`` needs no header of torch or Python, so it compiles in seconds and the same file serves any
version of both. The library lies in the cache under a hash of source, flags and compiler options; a later start only
loads it. Where it cannot be built the runner goes on with torch's operators, and one warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, OptionError, did_you_mean
from gossamer.core.paths import cache_dir
from gossamer.parts.decode_state import LANES
from gossamer.parts.decode_weights import GROUP, Codes, rounded
from gossamer.parts.huge_pages import in_huge_pages

SOURCE = Path(__file__).with_name("decode_kernels.cpp")
_COMMON = ("-O3", "-std=c++20", "-fopenmp", "-Wno-psabi")
_VNNI = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma")
_NEEDS = {
    "avx512bf16": (*_VNNI, "avx512_bf16"),
    "avx512vnni": _VNNI,
    "avx2": ("avx2", "fma"),
    "plain": (),
}


class MatrixStruct(ctypes.Structure):
    """``Matrix`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "minima", "bias")),
        *((name, ctypes.c_int32) for name in ("out", "columns", "bits", "wide")),
    )


class Library:
    """The loaded kernels; ``name`` is the path compiled in: avx512bf16, avx512vnni, avx2 or plain."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.path = name, path
        self.calls = ctypes.CDLL(str(path))

    def linear(self, matrix: MatrixStruct, x: Tensor) -> Tensor:
        """x float32 [n, columns] contiguous -> [n, out]."""
        y = x.new_empty(len(x), matrix.out)
        self.calls.gossamer_linear(
            ctypes.byref(matrix), address(x), ctypes.c_int(len(x)), address(y), ctypes.c_int(torch.get_num_threads())
        )
        return y


class NativeMatrix:
    """A matrix in the layout of the kernels. Float32 in and out."""

    def __init__(self, tensors: Sequence[Tensor | None], shape: tuple[int, int], bits: int, inputs: int, lib: Library):
        self.library, self.inputs = lib, inputs
        self.tensors = tuple(None if tensor is None else in_huge_pages(tensor) for tensor in tensors)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors if tensor is not None)
        scales = self.tensors[1]
        wide = scales is not None and scales.dtype == torch.float32
        self.struct = MatrixStruct(*map(address, self.tensors), *shape, bits, wide)

    def __call__(self, x: Tensor) -> Tensor:
        return self.library.linear(self.struct, F.pad(x.float(), (0, self.struct.columns - x.shape[1])).contiguous())


class NativeHalf(NativeMatrix):
    """A bfloat16 matrix [out, in]; activations are rounded to bfloat16 on the way, sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library) -> None:
        padded = _padded(F.pad(weight, (0, -weight.shape[1] % GROUP)))
        pairs = padded.view(-1, LANES, padded.shape[1] // 2, 2).transpose(1, 2)
        own = None if bias is None else bias.float().contiguous()
        super().__init__((pairs, None, None, own), (len(weight), padded.shape[1]), 16, weight.shape[1], library)


class NativeWeight(NativeMatrix):
    """An integer matrix."""

    def __init__(self, form: Codes, library: Library) -> None:
        tensors = (_codes(form), _blocks(form.scales), None if form.minima is None else _blocks(form.minima),
                   None if form.bias is None else form.bias.float().contiguous())  # fmt: skip
        out, columns = form.codes.shape
        super().__init__(tensors, (out, columns), form.bits, form.inputs, library)

    def rows(self, numbers: Tensor) -> Tensor:
        """Restored rows float32 [n, in]."""
        codes, scales, minima, _ = self.tensors
        assert codes is not None
        assert scales is not None
        block, lane = numbers // LANES, numbers % LANES
        part = codes.view(*codes.shape[:3], LANES, 4)[block, :, :, lane]
        if self.struct.bits == 4:
            part = torch.cat((part & 15, part >> 4), 2)
        values = (part.flatten(2).float() - (128 if self.struct.bits == 8 else 8)) * scales[block, :, lane].float()[
            ..., None
        ]
        if minima is not None:
            values = values + minima[block, :, lane][..., None]
        return values.flatten(1)[:, : self.inputs]


class NativeLinear(nn.Module):
    """A linear layer of 8 bits for inference, float32 in and out."""

    def __init__(self, layer: nn.Linear, library: Library) -> None:
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.form = NativeWeight(rounded(layer.weight.detach().float(), bias, 8), library)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def use_native_linears(module: nn.Module, library: Library) -> None:
    """Put one of the kernels' in the place of every linear layer of ``module``, which then no longer trains."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, NativeLinear(layer, library))


def load_native(mode: str, path: str | None = None) -> Library | None:
    """The kernels of the CPU's best ``path`` or of the one named. ``mode`` "require" raises :class:`GossamerError`
    where they cannot be built; "auto" gives None and warns, once a process."""
    path = path or best_path()
    if path not in _NEEDS:
        raise OptionError(f"path {path!r}", must="be known", do=did_you_mean(path, _NEEDS))
    found = _load(path)
    if isinstance(found, Library):
        return found
    if mode == "require":
        raise GossamerError("decoding kernels", must="compile", got=found, do="install a C++ compiler such as g++")
    _warn(found)
    return None


def best_path() -> str:
    """The widest path that this CPU runs."""
    flags = _cpu_flags()
    return next(name for name, needs in _NEEDS.items() if flags.issuperset(needs))


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _load(name: str) -> Library | str:
    """The library, or why there is none."""
    flags = [*_COMMON, *(f"-m{need.replace('_', '')}" for need in _NEEDS[name])]
    key = [SOURCE.read_text(encoding="utf-8"), *flags, os.environ.get("CXX", ""), platform.machine()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    final = cache_dir("kernels") / f"decode_{name}_{digest}.so"
    try:
        with FileLock(f"{final}.lock"):
            if not final.exists():
                _build(final, flags)
        return Library(final, name)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _build(final: Path, flags: list[str]) -> None:
    from torch.utils.cpp_extension import get_cxx_compiler

    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        made = Path(folder) / final.name
        command = [get_cxx_compiler(), *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr))
        os.replace(made, final)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"decoding kernels cannot be built, torch's operators are used instead ({reason})", stacklevel=4)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _codes(form: Codes) -> Tensor:
    """uint8 [blocks, groups, 8 or 4, 64]."""
    codes = form.codes
    unsigned = codes.view(torch.uint8) ^ 128 if form.bits == 8 else (codes + 8).view(torch.uint8)
    grid = _padded(unsigned).view(-1, LANES, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4).flatten(-2)
    return grid if form.bits == 8 else grid[:, :, :4] | grid[:, :, 4:] << 4


def _blocks(values: Tensor) -> Tensor:
    """[out, groups] -> [blocks, groups, 16]."""
    return _padded(values).view(-1, LANES, values.shape[1]).transpose(1, 2)


def _padded(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % LANES)).contiguous()
