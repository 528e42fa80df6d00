"""A GGUF file as a model: is it whole, and what does it hold.

Layout: magic, version, counts, key-value fields, tensor descriptions, then aligned tensor data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from pathlib import Path

from gossamer.core.errors import InputError

_AGAIN = "fetch the file again and compare its size with the source's"


def check_gguf(path: Path) -> str:
    """Architecture name of a whole GGUF file. Raises InputError for another file or one cut short."""
    from gguf import GGUFReader

    where, size = str(path), path.stat().st_size
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(where, must="be a GGUF file", got=f"{size} bytes that begin with {magic!r}", do=_AGAIN)
    try:
        # the reader maps every field and tensor, so that one that reaches beyond the end fails here
        reader = GGUFReader(path)
        architecture = reader.get_field("general.architecture")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        got = f"{size} bytes with a part missing"
        raise InputError(where, must="be a whole GGUF file, and it was cut short", got=got, do=_AGAIN) from error
    if architecture is None or not reader.tensors:
        do = "choose a file with a model's weights"
        raise InputError(where, must="hold a model", got=f"{len(reader.tensors)} tensors, no architecture", do=do)
    return str(architecture.contents())
