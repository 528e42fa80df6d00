"""Where things are kept, and writes that leave nothing half done under a final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.core.errors import GossamerError


def cache_dir(*parts: str) -> Path:
    """``$GOSSAMER_CACHE`` or ``$XDG_CACHE_HOME/gossamer`` or ``~/.cache/gossamer``, with ``parts`` below it, made."""
    base = os.environ.get("GOSSAMER_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gossamer"
    path = root.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def atomic_dir(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces ``final`` on success and is removed on any error.

    A full disk is reported as an error that names ``final``; what stood there before stays.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield temporary
        # mkdtemp makes 0700; a model folder is as readable as any other
        temporary.chmod(0o777 & ~_umask())
        old = None
        if final.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
            os.replace(final, old / final.name)
        os.replace(temporary, final)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_error(final, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling path that replaces ``final`` on success and is removed on any error."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(final, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(final: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(final) as path:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(final: Path, error: OSError) -> GossamerError:
    if isinstance(error, FileNotFoundError | PermissionError) or error.errno is not None:
        return GossamerError(
            f"writing {final}",
            must="be possible",
            got=error.strerror or str(error),
            do="nothing was left under that name; free space or choose another folder and run again",
        )
    return GossamerError(f"writing {final}", must="be possible", got=str(error), do="run again")
