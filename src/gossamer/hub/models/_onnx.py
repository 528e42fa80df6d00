"""Weights and wiring of an ONNX file, read from its protobuf bytes without the onnx package.

A protobuf message is a run of (field number, wire type, payload). Four messages of onnx.proto3 are enough here:
ModelProto.graph = 7; GraphProto.node = 1, .initializer = 5; NodeProto.input = 1, .output = 2, .op_type = 4;
TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from gossamer.core.errors import InputError

_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation: names of its input and output tensors."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(path: Path) -> tuple[dict[str, torch.Tensor], list[Node]]:
    """Float32 initialisers by name and the nodes in graph order. Raises InputError for a file cut short."""
    weights: dict[str, torch.Tensor] = {}
    nodes: list[Node] = []
    try:
        for field, value in _fields(memoryview(path.read_bytes())):
            if field != 7 or not isinstance(value, memoryview):
                continue
            for part, message in _fields(value):
                if part == 1 and isinstance(message, memoryview):
                    nodes.append(_node(message))
                elif part == 5 and isinstance(message, memoryview):
                    _read_tensor(message, weights)
    except (ValueError, IndexError) as error:
        raise InputError(str(path), must="be a whole ONNX file", got=str(error), do="fetch it again") from error
    return weights, nodes


def _node(message: memoryview) -> Node:
    strings: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for field, value in _fields(message):
        if field in strings and isinstance(value, memoryview):
            strings[field].append(str(value, "utf-8"))
    return Node(strings[4][0], tuple(strings[1]), tuple(strings[2]))


def _read_tensor(message: memoryview, weights: dict[str, torch.Tensor]) -> None:
    dims: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for field, value in _fields(message):
        if field == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field == 8 and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == 9 and isinstance(value, memoryview):
            raw = value
    if kind != _FLOAT or not raw:
        return
    if len(raw) != 4 * math.prod(dims):
        raise ValueError(f"{len(raw)} bytes for {name} of shape {dims}")
    weights[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            number, at = _varint(message, at)
            yield field, number
            continue
        if wire == _BYTES:
            length, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(message):
            raise ValueError(f"the file ends {at + length - len(message)} bytes too early")
        yield field, message[at : at + length]
        at += length


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        number, at = _varint(message, at)
        yield number


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return number, at
        shift += 7
