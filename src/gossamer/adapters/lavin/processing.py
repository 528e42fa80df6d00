"""Rows of instructions, with an image or without, to batches around a tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # type: ignore[attr-defined]
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from gossamer.core.errors import InputError
from gossamer.parts.front_end import IGNORED


class LaVINProcessor:
    """Rows ``{"image": path, picture or null, "instruction", "answer"}`` to batches; else it is the tokenizer."""

    def __init__(self, tokenizer: Any, visual_length: int, image_size: int) -> None:
        self.tokenizer, self.visual_length = tokenizer, visual_length
        self.images = BitImageProcessorPil(
            size={"height": image_size, "width": image_size}, do_center_crop=False, do_convert_rgb=True,
            image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def examples(self, rows: Iterable[Mapping[str, Any]], *, max_length: int = 512) -> list[dict[str, Any]]:
        """Token rows; InputError for a row without instruction or answer or with an image that cannot be read."""
        made = [self._example(row, number, max_length) for number, row in enumerate(rows, 1)]
        if len({example["modality"] for example in made}) == 1 and self.visual_length:
            warnings.warn("lavin: all rows are of one modality, so the router cannot learn to tell them", stacklevel=2)
        return made

    def prompts(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of instructions without answers, padded on the left, for :meth:`LaVIN.generate`."""
        made = [self._example({**row, "answer": ""}, number, 0) for number, row in enumerate(rows, 1)]
        return self._batch(made, left=True)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Padded on the right: input_ids, attention_mask, labels, visual [b, t], modality [b], and images.

        Images are ``features`` [i, n, d_v] where the rows bring them, else ``pixel_values`` [i, 3, h, w].
        """
        return self._batch(examples, left=False)

    def _example(self, row: Mapping[str, Any], number: int, max_length: int) -> dict[str, Any]:
        missing = [key for key in ("instruction", "answer") if not isinstance(row.get(key), str)]
        if missing:
            raise InputError(f"row {number}", must="have an instruction and an answer", got=f"no {missing[0]}")
        image = row.get("features") if row.get("features") is not None else row.get("image")
        if image is not None and not self.visual_length:
            raise InputError(
                f"row {number}", must="have no image where no vision tower is", do="name a companion vision"
            )
        split = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        lead = [*start, *split("Image: " if image is not None else "Image: N/A")]
        seen = self.visual_length if image is not None else 0
        prompt = split(f"\n{row['instruction']}\n")
        answer = [*split(row["answer"]), self.tokenizer.eos_token_id] if row["answer"] else []
        if max_length:
            prompt = prompt[: max(1, max_length - len(lead) - seen - len(answer))]
        ids = [*lead, *[lead[-1]] * seen, *prompt, *answer]
        visual = [False] * len(lead) + [True] * seen + [False] * (len(prompt) + len(answer))
        labels = [IGNORED] * (len(ids) - len(answer)) + answer
        opened = image if image is None or isinstance(image, Tensor) else self._open(image, number)
        return {
            "input_ids": ids,
            "visual": visual,
            "labels": labels,
            "image": opened,
            "modality": int(image is not None),
        }

    def _open(self, image: Any, number: int) -> Any:
        if isinstance(image, Image.Image):
            return image
        try:
            with Image.open(Path(image)) as opened:
                return opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(
                f"row {number}: image", must="be readable", got=str(error), do="mend it or leave it out"
            ) from error

    def _batch(self, examples: Sequence[Mapping[str, Any]], *, left: bool) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def padded(key: str, fill: Any) -> Tensor:
            rows = [(list(example[key]), [fill] * (width - len(example[key]))) for example in examples]
            return torch.tensor([more + row if left else row + more for row, more in rows])

        lengths = [[True] * len(example["input_ids"]) for example in examples]
        mask = [[False] * (width - len(row)) + row if left else row + [False] * (width - len(row)) for row in lengths]
        batch = {
            "input_ids": padded("input_ids", pad), "attention_mask": torch.tensor(mask).long(),
            "labels": padded("labels", IGNORED), "visual": padded("visual", False),
            "modality": torch.tensor([example["modality"] for example in examples]),
        }  # fmt: skip
        images = [example["image"] for example in examples if example["image"] is not None]
        if images and isinstance(images[0], Tensor):
            batch["features"] = torch.stack(images)
        elif images:
            batch["pixel_values"] = torch.stack([self.pixels(image) for image in images])
        return batch

    def pixels(self, image: Any) -> Tensor:
        """[3, h, w], normalised as the vision tower was trained."""
        return self.images(image, return_tensors="pt")["pixel_values"][0]
