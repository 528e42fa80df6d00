"""What is known of a domain: unlabelled images, names of its classes, and perhaps a few labels; and its batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gossamer.core.errors import InputError, did_you_mean

Shot = tuple[Any, int]
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Domain:
    """``data`` of the distillation. An image is a PIL image, a uint8 array [h, w, 3] or the path of a file.

    ``images`` is a list of them or a folder. ``shots`` and ``held_out`` are (image, class name) pairs: the first teach
    the teacher, the second are for the report alone. The classes with shots are the base classes, all others are novel.
    ``templates`` hold ``{}`` for the name; prompts are put into the first. ``processor`` is the student's.
    """

    images: Sequence[Any]
    class_names: tuple[str, ...]
    shots: tuple[Shot, ...] = ()
    held_out: tuple[Shot, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    processor: Any = None

    @classmethod
    def read(cls, data: Any, where: str) -> Domain:
        """Check ``data``, a mapping with these keys or a list of images with none; raises :class:`InputError`."""
        if not isinstance(data, Mapping):
            raise InputError(
                f"{where}: data",
                must="be a mapping with images and class_names",
                got=type(data).__name__,
                do='give {"images": [...], "class_names": [...], "shots": [(image, name), ...]}',
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise InputError(f"{where}: data", must=f"have only {sorted(known)}", got=repr(key),
                                 do=did_you_mean(str(key), known))  # fmt: skip
        names = _names(data.get("class_names"), where)
        images = _images(data.get("images"), where)
        shots, held_out = (_labelled(data.get(key, ()), names, f"{where}: {key}") for key in ("shots", "held_out"))
        templates = tuple(data.get("templates", cls.templates))
        for template in templates:
            if template.count("{}") != 1:
                raise InputError(f"{where}: templates", must="hold one {} for the class name", got=repr(template))
        if not templates:
            raise InputError(f"{where}: templates", must="hold at least one", got="none")
        return cls(images, names, shots, held_out, templates, data.get("processor"))

    @property
    def base(self) -> list[int]:
        """Classes with shots."""
        return sorted({label for _, label in self.shots})


def _names(given: Any, where: str) -> tuple[str, ...]:
    names = tuple(given or ()) if not isinstance(given, str) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{where}: class_names", must="be a list of names that are not empty", got=repr(given))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: class_names", must="name each class once", got=f"{twice} more than once")
    return names


def _images(given: Any, where: str) -> Sequence[Any]:
    if isinstance(given, str | Path):
        folder = Path(given)
        if not folder.is_dir():
            raise InputError(f"{where}: images", must="be images or a folder of them", got=f"no folder {folder}")
        given = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if given is None or len(given) < 2:
        count = 0 if given is None else len(given)
        raise InputError(f"{where}: images", must="be at least 2, for batch statistics", got=f"{count}")
    return given


def _labelled(given: Any, names: tuple[str, ...], where: str) -> tuple[Shot, ...]:
    pairs = []
    for image, name in given:
        if name not in names:
            raise InputError(where, must="have labels among class_names", got=repr(name), do=did_you_mean(name, names))
        pairs.append((image, names.index(name)))
    return tuple(pairs)


def open_image(image: Any) -> Image.Image:
    """PIL image in RGB of an image as :class:`Domain` has it."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise InputError("an image", must="be uint8 [h, w, 3]", got=f"{image.dtype} {list(image.shape)}")
        return Image.fromarray(image)
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(str(image), must="be a readable image", got=str(error)) from error
    if not isinstance(image, Image.Image):
        raise InputError("an image", must="be a PIL image, a uint8 array or a path", got=type(image).__name__)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Crop:
    """A part of an image (shares of width and height), perhaps mirrored; the same for teacher and student."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mirrored: bool = False

    @property
    def whole(self) -> bool:
        return self == Crop()

    def of(self, image: Image.Image, size: int) -> Image.Image:
        """[size, size] pixels of it, bicubic."""
        w, h = image.size
        box = (self.left * w, self.top * h, self.right * w, self.bottom * h)
        cut = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else cut


def draw_crop(image: Image.Image, generator: torch.Generator) -> Crop:
    """A random part of 8 to 100 % of the area and aspect 3/4 to 4/3, mirrored half of the time."""
    w, h = image.size
    for _ in range(10):
        share, aspect, x, y, mirror = torch.rand(5, generator=generator).tolist()
        area = (0.08 + 0.92 * share) * w * h
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        width, height = math.sqrt(area * ratio) / w, math.sqrt(area / ratio) / h
        if width <= 1 and height <= 1:
            left, top = x * (1 - width), y * (1 - height)
            return Crop(left, top, left + width, top + height, mirror < 0.5)
    return Crop(mirrored=bool(torch.rand((), generator=generator) < 0.5))


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one epoch in random order; a rest that is smaller than ``size`` is left to the next epoch."""
    order = torch.randperm(count, generator=generator)
    size = min(size, count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
