"""What a packaged model says of itself, and the checked way to its files.

A model file of this folder holds ``MODEL`` (a PackagedModel) and ``convert(target) -> facts``, which writes an
ordinary Hugging Face folder into ``target`` and returns facts for the manifest. Files of a package are found through
its installed metadata, so that the package itself is never imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

from gossamer.core.errors import InputError, MissingExtra
from gossamer.core.paths import sha256


@dataclasses.dataclass(frozen=True)
class PackagedFile:
    """One file of an installed distribution, with the hash that it must have."""

    package: str
    version: str
    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """Name, terms and sources of a model that a Python package ships."""

    name: str
    licence: str
    files: tuple[PackagedFile, ...]
    notes: tuple[str, ...]
    extra: str = ""  # Gossamer's extra that installs the package; where there is none, ``install`` says how
    install: str = ""
    revision: int = 1  # raised when ``convert`` writes something else, so that older caches are made again

    def read(self) -> list[Path]:
        """Paths of ``files``, each there and with the hash it must have.

        Raises MissingExtra or InputError where a package is not installed, InputError where a file is not the one
        that the conversion was written for.
        """
        return [self._checked(file) for file in self.files]

    def _checked(self, file: PackagedFile) -> Path:
        where = f"model {self.name!r}"
        again = f"install it again: {self.install or f'pip install --force-reinstall {file.package}=={file.version}'}"
        try:
            distribution = importlib.metadata.distribution(file.package)
        except importlib.metadata.PackageNotFoundError as error:
            if self.extra:
                raise MissingExtra(where, self.extra) from error
            must = f"have the package {file.package} {file.version} installed"
            raise InputError(where, must=must, got="no such package", do=self.install) from error
        path = Path(str(distribution.locate_file(file.path)))
        if not path.is_file():
            raise InputError(where, must=f"find {file.path} in {file.package}", got="no such file", do=again)
        found = sha256(path)
        if found != file.sha256:
            got = f"{found} ({path.stat().st_size} bytes, {file.package} {distribution.version})"
            raise InputError(f"{where}: {path}", must=f"have SHA-256 {file.sha256}", got=got, do=again)
        return path
