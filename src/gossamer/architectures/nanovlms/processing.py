"""Rows to batches for nanovlms: images, texts behind their visual tokens, and the small tokenizer of a child's words.

input_ids = [<image> * n, <s>, w_1 ... w_t, </s>],  labels = -100 at the images and the padding
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from gossamer.architectures.nanovlms.modeling import NanoVLMConfig
from gossamer.core.errors import InputError
from gossamer.parts.front_end import IGNORED

IMAGE = "<image>"
SPECIAL = (IMAGE, "<s>", "</s>", "<pad>")  # ids 0 to 3, which the model's config names


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocabulary`` tokens; any text can be written in it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE}, padding_side="right",
    )  # fmt: skip


class NanoVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer; ``unreadable`` counts the rows whose image could not be opened."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        visual_length: int = 1,
        max_length: int = 128,
        **kwargs: Any,
    ) -> None:
        self.visual_length, self.max_length = visual_length, max_length
        self.unreadable = 0
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def of(cls, tokenizer: Any, image_size: int, visual_length: int, max_length: int) -> NanoVLMProcessor:
        images = ViTImageProcessorPil(
            size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        return cls(images, tokenizer, visual_length=visual_length, max_length=max_length)

    def __call__(self, images: Any, text: str | Sequence[str] = "", **kwargs: Any) -> BatchFeature:
        """Prompts for ``generate``: images with the first words of their descriptions, padded on the left."""
        images = images if isinstance(images, list | tuple) else [images]
        starts = [text] * len(images) if isinstance(text, str) else list(text)
        rows = [self._ids(start) for start in starts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        return BatchFeature(
            {"input_ids": ids, "attention_mask": (ids != pad).long(), "pixel_values": self.pixels(images)}
        )

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """[b, 3, h, w], normalised."""
        opened = [image if isinstance(image, Image.Image) else Image.open(image) for image in images]
        found = self.image_processor([image.convert("RGB") for image in opened], return_tensors="pt")
        return found["pixel_values"]

    def examples(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``{"image": path or picture, "text"}`` to token rows; unreadable images are left out and counted."""
        found = []
        for number, row in enumerate(rows, 1):
            missing = [key for key in ("image", "text") if not row.get(key)]
            if missing:
                raise InputError(f"row {number}", must="have an image and a text", got=f"no {missing[0]}")
            if not isinstance(row["image"], Image.Image) and not _readable(Path(row["image"])):
                self.unreadable += 1
                continue
            ids = [*self._ids(row["text"]), self.tokenizer.eos_token_id]
            found.append({"image": row["image"], "input_ids": ids})
        if not found:
            raise InputError("rows", must="hold a readable image", got=f"{self.unreadable} that are not")
        return found

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch padded on the right: input_ids, attention_mask, labels [b, t], pixel_values [b, 3, h, w]."""
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        pad = self.tokenizer.pad_token_id
        joined = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        labels = joined.masked_fill((mask == 0) | (joined == image), IGNORED)
        return {
            "input_ids": joined,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": self.pixels([example["image"] for example in examples]),
        }

    def _ids(self, text: str) -> list[int]:
        image, start = self.tokenizer.convert_tokens_to_ids(IMAGE), self.tokenizer.bos_token_id
        words = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [image] * self.visual_length + [start, *words[: self.max_length - 2]]


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, UnidentifiedImageError, SyntaxError):
        return False
    return True


AutoProcessor.register(NanoVLMConfig, NanoVLMProcessor)
