"""Two frozen towers: pictures and texts as vectors, by any image encoder and any text encoder.

    images: [n] pictures -> [n, image_width],    texts: [n] strings -> [n, text_width]

float32, on the CPU, not normalised: cosines are taken where vectors are scored (``gossamer.parts.contrastive``).
``gossamer.hub.encoders.open_dual_encoder`` opens one by name. Three kinds:

- a CLIP or SigLIP checkpoint: the projected feature of each tower; both lie in one space, ``tau`` is its temperature;
- two unrelated encoders: of a vision transformer the class token and the mean of the patch tokens side by side
  (the linear-probe feature of DINOv2, Oquab et al. 2023), of a sentence encoder the mean over tokens; ``tau`` is None;
- such a pair with a learned :class:`Head` that maps both into one space (LiT, Zhai et al. 2022).

The towers compute in bfloat16 by default. Everything that a vector depends on goes into ``fingerprint``, so that
features and vocabularies of another encoder are refused. Pictures are PIL images or uint8 arrays [h, w, 3].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.paths import atomic_file, write_json
from gossamer.parts.contrastive import Temperature
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.sentences import encode_texts

Picture = Image.Image | np.ndarray[Any, Any]
Side = Literal["both", "images", "texts"]

PROBES = ("a red apple on a table", "wash the dishes", "two people walking in the rain", "Quantum field theory, 1954")
_PROBE_SLACK = 3  # of 127: bfloat16 on another processor moves a cosine by less than 0.01


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From a picture to the pixels that a tower expects: resize, crop, scale to [0, 1], (value - mean) / std.

    ``fit`` "crop" brings the shorter side to ``edge`` and cuts the middle ``size`` x ``size``; "squash" brings the
    whole picture to ``size`` x ``size``, so that nothing at its rim is lost.
    """

    size: int
    edge: int
    fit: Literal["crop", "squash"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Literal["bicubic", "bilinear"]

    @classmethod
    def of(cls, processor: Any, size: int | None = None, fit: Literal["crop", "squash"] | None = None) -> Preparation:
        """With the constants of a transformers image processor; ``size`` and ``fit`` None are its own.

        At another size the margin that the processor cuts off stays the same share of the picture.
        """
        own = dict(processor.size or {})
        edge = own.get("shortest_edge") or own.get("height")
        if not edge or processor.resample not in (2, 3):
            got = f"size {own}, resample {processor.resample}"
            must = "resize by bicubic or bilinear interpolation to a shortest edge or a height"
            raise InputError(f"image processor {type(processor).__name__}", must=must, got=got)
        crops = "shortest_edge" in own
        cut: Any = dict(processor.crop_size or {}).get("height", edge) if crops and processor.do_center_crop else edge
        target = int(cut) if size is None else size
        return cls(
            size=target,
            edge=round(target * edge / cut),
            fit=fit or ("crop" if crops else "squash"),
            mean=tuple(map(float, processor.image_mean)),
            std=tuple(map(float, processor.image_std)),
            resample="bicubic" if processor.resample == 3 else "bilinear",
        )

    def __call__(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """[n, 3, size, size], float32. Pictures of one shape are resized together."""
        arrays = [as_array(picture) for picture in pictures]
        pixels = torch.empty(len(arrays), 3, self.size, self.size)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, array in enumerate(arrays):
            shapes.setdefault(array.shape, []).append(place)
        for places in shapes.values():
            stack = torch.from_numpy(np.stack([arrays[place] for place in places])).permute(0, 3, 1, 2)
            pixels[places] = self._resized(stack).float()
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def _resized(self, stack: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, size, size]"""
        height, width = stack.shape[2:]
        if self.fit == "squash":
            wanted = (self.size, self.size)
        else:
            short = min(height, width)
            wanted = (int(self.edge * height / short), int(self.edge * width / short))
        if wanted != (height, width):
            # on bytes and with antialiasing, as Pillow does it
            stack = nn.functional.interpolate(stack, size=wanted, mode=self.resample, antialias=True)
        top, left = (wanted[0] - self.size) // 2, (wanted[1] - self.size) // 2
        return stack[:, :, top : top + self.size, left : left + self.size]


def as_array(picture: Picture) -> np.ndarray[Any, Any]:
    """uint8 [h, w, 3]; what is transparent is laid on white. Raises InputError for anything else than a picture."""
    if isinstance(picture, Image.Image):
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            ground = Image.new("RGBA", layer.size, "white")
            picture = Image.alpha_composite(ground, layer)
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        got = f"{picture.dtype} {list(picture.shape)}" if hasattr(picture, "dtype") else type(picture).__name__
        must = "be a PIL image or a uint8 array [height, width, 3]"
        raise InputError("picture", must=must, got=got, do="convert it to RGB bytes")
    if 0 in picture.shape:
        raise InputError("picture", must="have pixels", got=f"{picture.shape[1]} x {picture.shape[0]}")
    return np.ascontiguousarray(picture)


class ImageTower:
    """A frozen image encoder. ``model`` is a CLIP-like model (``get_image_features``) or a vision transformer."""

    def __init__(self, model: Any, prepare: Preparation) -> None:
        self.model, self.prepare = model, prepare
        config = model.config
        self.projects = hasattr(model, "get_image_features")
        inner = config.vision_config if self.projects else config
        patch = getattr(inner, "patch_size", 1)
        if prepare.size % patch:
            near = max(1, round(prepare.size / patch)) * patch
            must = f"be a multiple of the patch size {patch}"
            raise InputError("image size", must=must, got=prepare.size, do=f"take {near}")
        self.pooling = "projected" if self.projects else "class token, mean of patches"
        # CLIP and SigLIP interpolate positions only when asked, DINOv2 always
        self.extra = {"interpolate_pos_encoding": True} if self.projects else {}
        self.width = self(torch.zeros(1, 3, prepare.size, prepare.size)).shape[1]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, size, size] -> [n, width], float32."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        if self.projects:
            return self.model.get_image_features(pixel_values=pixels, **self.extra).pooler_output.float()
        hidden = self.model(pixel_values=pixels).last_hidden_state.float()
        return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1)


class TextTower:
    """A frozen text encoder. ``model`` is a CLIP-like model (``get_text_features``) or a sentence encoder."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.projects = hasattr(model, "get_text_features")
        config = model.config.text_config if self.projects else model.config
        self.limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        # SigLIP was trained on texts padded to the full length, without a mask
        full = model.config.model_type.startswith("siglip")
        self.padding = {"padding": "max_length", "max_length": self.limit} if full else {"padding": "longest"}
        self.pooling = "projected" if self.projects else "mean of tokens, length 1"
        self.width = self(["a"]).shape[1]

    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """[n, width], float32. Raises InputError for a text that is longer than the encoder reads."""
        for place, text in enumerate(texts):
            # no token is shorter than a byte, so few texts have to be counted
            if len(text.encode()) + 2 > self.limit and len(self.tokenizer(text).input_ids) > self.limit:
                got = f"{len(self.tokenizer(text).input_ids)} in text {place}: {text[:40]!r}..."
                raise InputError("text", must=f"have at most {self.limit} tokens", got=got, do="shorten it")
        if not self.projects:
            return encode_texts(self.model, self.tokenizer, texts, batch_size)
        return self._projected(texts, batch_size)

    @torch.no_grad()
    def _projected(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        parts = []
        for start in range(0, len(order), batch_size):
            rows = [texts[place] for place in order[start : start + batch_size]]
            batch = self.tokenizer(rows, return_tensors="pt", **self.padding)
            parts.append(self.model.get_text_features(**batch.to(self.model.device)).pooler_output.float())
        return torch.cat(parts)[torch.tensor(order).argsort()]


class Head(nn.Module):
    """Maps both sides into one space of ``width``: linear (``hidden`` None) or with one GELU layer; float32."""

    def __init__(self, image_width: int, text_width: int, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.images, self.texts = (self._map(size, width, hidden) for size in (image_width, text_width))
        self.temperature = Temperature()

    @staticmethod
    def _map(wide: int, width: int, hidden: int | None) -> nn.Module:
        # both towers keep their own scale; without this the longer one would decide the step size
        first: nn.Module = nn.LayerNorm(wide, elementwise_affine=False)
        if hidden is None:
            return nn.Sequential(first, nn.Linear(wide, width))
        return nn.Sequential(first, nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, width))


class DualEncoder:
    """Both towers, frozen, in evaluation mode, in ``dtype`` on ``device``. The models given are converted in place.

    ``tau`` is the temperature of the space that both sides share, None where they share none. ``fingerprint`` is
    ``image_fingerprint`` + "+" + ``text_fingerprint``; the text's ends in the cosines between four probe texts, so
    that another tokenizer or another pooling shows as well. ``weights`` are the fingerprints of the two models alone.
    """

    def __init__(
        self,
        name: str,
        image_model: Any,
        text_model: Any,
        tokenizer: Any,
        prepare: Preparation,
        *,
        head: Head | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        # of the weights as they were stored, so that the precision of the computation makes no other encoder
        stored = {id(model): fingerprint(model) for model in (image_model, text_model)}
        for model in (image_model, text_model):
            model.to(device, dtype).eval().requires_grad_(False)
        self.weights = {"images": stored[id(image_model)], "texts": stored[id(text_model)]}
        self.name, self.head = name, None if head is None else head.to(device).eval().requires_grad_(False)
        self.image_tower, self.text_tower = ImageTower(image_model, prepare), TextTower(text_model, tokenizer)
        self.tau = self._tau()
        extra = "" if head is None else fingerprint(head)
        self.image_fingerprint = _digest(
            self.weights["images"], self.image_tower.pooling, dataclasses.asdict(prepare), extra
        )
        self.image_width, self.text_width = self.image_tower.width, self.text_tower.width
        if head is not None:
            self.image_width = self.text_width = _out_width(head.images)
        probes = nn.functional.normalize(self.texts(PROBES), dim=1)
        cosines = (probes @ probes.T)[*torch.triu_indices(len(PROBES), len(PROBES), offset=1)]
        seen = bytes(int(value) for value in (127 + 127 * cosines).round().clamp(0, 254)).hex()
        self.text_fingerprint = _digest(self.weights["texts"], self.text_tower.pooling, extra) + "-" + seen
        self.fingerprint = f"{self.image_fingerprint}+{self.text_fingerprint}"

    @torch.no_grad()
    def images(self, pictures: Sequence[Picture], batch_size: int = 32) -> torch.Tensor:
        """[n, image_width], float32, not normalised; [0, image_width] for none. InputError where one is not finite."""
        parts = [torch.zeros(0, self.image_width)]
        for start in range(0, len(pictures), batch_size):
            features = self.image_tower(self.image_tower.prepare(pictures[start : start + batch_size]))
            parts.append((features if self.head is None else self.head.images(features)).cpu())
        return check_finite(torch.cat(parts), f"image encoder {self.name}")

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """[n, text_width], float32, not normalised further; [0, text_width] for none. Same errors as ``images``."""
        if isinstance(texts, str):
            raise InputError("texts", must="be a list of strings", got="one string", do="put it into a list")
        if not texts:
            return torch.zeros(0, self.text_width)
        features = self.text_tower(texts, batch_size)
        features = (features if self.head is None else self.head.texts(features)).cpu()
        return check_finite(features, f"text encoder {self.name}")

    def check_fits(
        self, name: str, width: int, fingerprint: str, *, side: Side = "both", where: str = "what was stored"
    ) -> None:
        """Raise InputError unless vectors that were stored with this name, width and fingerprint are this encoder's.

        ``side`` says which fingerprint it is; the width is that of the pictures for "images", else of the texts.
        """
        do = f"open the encoder {name!r} as it was then, or make {where} again with {self.name!r}"
        mine = self.image_width if side == "images" else self.text_width
        if width != mine:
            raise InputError(f"{where}: width", must=f"be that of {self.name!r}, {mine}", got=width, do=do)
        own = {"both": self.fingerprint, "images": self.image_fingerprint, "texts": self.text_fingerprint}[side]
        if not same_encoder(own, fingerprint):
            got = f"{name!r} {fingerprint}"
            raise InputError(where, must=f"be made with the encoder {self.name!r} {own}", got=got, do=do)

    def _tau(self) -> float | None:
        if self.head is not None:
            return float(self.head.temperature())
        image, text = self.image_tower.model, self.text_tower.model
        return float(torch.exp(-image.logit_scale.float())) if image is text and self.image_tower.projects else None


class FeatureCache:
    """Tensors by key in a folder, one safetensors file each, of one encoder and one side.

    Another encoder's folder is refused with InputError, and so is a feature that is not finite.
    """

    def __init__(self, folder: Path, encoder: DualEncoder, side: Literal["images", "texts"] = "images") -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        images = side == "images"
        self.width = encoder.image_width if images else encoder.text_width
        own = encoder.image_fingerprint if images else encoder.text_fingerprint
        facts = {"name": encoder.name, "width": self.width, "fingerprint": own, "side": side}
        path = self.folder / "encoder.json"
        with FileLock(self.folder / ".lock"):
            if not path.is_file():
                write_json(path, facts)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["side"] != side:
            raise InputError(f"feature cache {folder}", must=f"hold {side}", got=found["side"], do="use another folder")
        where = f"feature cache {folder}"
        encoder.check_fits(found["name"], found["width"], found["fingerprint"], side=side, where=where)

    def get(self, key: str) -> torch.Tensor | None:
        """[n, width], float32, or None where nothing is stored under ``key``."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as stored:
                return stored.get_tensor("features")
        except SafetensorError as error:
            must, do = "be a whole safetensors file", "delete it; it is made again"
            raise InputError(str(path), must=must, got=str(error), do=do) from error

    def put(self, key: str, features: torch.Tensor) -> None:
        """Store [n, width] under ``key``, atomically."""
        if features.dim() != 2 or features.shape[1] != self.width:
            raise InputError(f"features of {key!r}", must=f"be [n, {self.width}]", got=list(features.shape))
        check_finite(features, f"features of {key!r}")
        with atomic_file(self._path(key)) as temporary:
            save_file({"features": features.float().contiguous()}, temporary, metadata={"key": key})

    def of(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is stored under ``key``, made and stored first where nothing is."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def check_finite(features: torch.Tensor, where: str) -> torch.Tensor:
    """``features`` [n, d] as they are; InputError that names the first row with a NaN or an infinity."""
    wrong = (~torch.isfinite(features)).any(dim=-1)
    if wrong.any():
        got = f"NaN or infinity in row {int(wrong.nonzero()[0])} of {len(features)}"
        raise InputError(where, must="give finite numbers", got=got, do="look at that picture or text, and the weights")
    return features


def same_encoder(first: str, second: str) -> bool:
    """Whether two fingerprints are one encoder's: equal, the cosines of the probe texts up to rounding."""
    one, two = first.split("-"), second.split("-")
    if len(one) != len(two) or one[0] != two[0] or any(len(a) != len(b) for a, b in zip(one, two, strict=True)):
        return False
    try:
        pairs = zip(bytes.fromhex("".join(one[1:])), bytes.fromhex("".join(two[1:])), strict=True)
    except ValueError:
        return False
    return all(abs(a - b) <= _PROBE_SLACK for a, b in pairs)


def _out_width(module: nn.Module) -> int:
    return int(list(module.parameters())[-1].shape[0])


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
