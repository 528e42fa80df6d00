"""Tiny GIT and BLIP from transformers' own classes, taking the batches of nanovlms' processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    GitConfig,
    GitForCausalLM,
)

WIDTH, HEADS, ENCODER = 192, 3, 3
LENGTH = 128  # positions


class Rival(nn.Module):
    """One of them; it sees the image on its own way, so the image token at the front of a row is cut off."""

    def __init__(self, name: str, vocabulary: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.model: Any = {"git": _git, "blip": _blip}[name](vocabulary, image_size, patch_size)
        self.config = self.model.config
        self._start_seeing()

    @torch.no_grad()
    def _start_seeing(self) -> None:
        """Patches and positions start as large as those of nanovlms."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, 0.16)  # BLIP's start at zero
        for key, parameter in self.model.named_parameters():
            if "position_embedding" in key and "vision_model" in key:
                parameter.normal_(0.0, 0.2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixel_values: Tensor, **kwargs: Any
    ) -> Any:
        texts, mask, targets = (part[:, 1:] for part in (input_ids, attention_mask, labels))
        return self.model(input_ids=texts, attention_mask=mask, labels=targets, pixel_values=pixel_values)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, max_new_tokens: int, **kwargs: Any
    ) -> Tensor:
        """Prompts of one length; the tokens with the prompt, as the model of nanovlms gives them."""
        texts, mask = input_ids[:, 1:], attention_mask[:, 1:]
        if isinstance(self.model, BlipForConditionalGeneration):
            # its generate takes the last token of a prompt for a separator and drops it
            texts, mask = nn.functional.pad(texts, (0, 1)), nn.functional.pad(mask, (0, 1), value=1)
        found: Tensor = self.model.generate(
            input_ids=texts, attention_mask=mask, pixel_values=pixel_values, max_new_tokens=max_new_tokens,
            do_sample=False,
        )  # fmt: skip
        return found


def _git(vocabulary: int, image_size: int, patch_size: int) -> Any:
    config = GitConfig(
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": ENCODER,
            "num_attention_heads": HEADS, "image_size": image_size, "patch_size": patch_size,
        },
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return GitForCausalLM(config)


def _blip(vocabulary: int, image_size: int, patch_size: int) -> Any:
    text = BlipTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, encoder_hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        projection_dim=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, max_position_embeddings=LENGTH,
        bos_token_id=1, eos_token_id=2, sep_token_id=2, pad_token_id=3,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH, num_hidden_layers=ENCODER,
        num_attention_heads=HEADS, image_size=image_size, patch_size=patch_size,
    )  # fmt: skip
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=WIDTH)
    return BlipForConditionalGeneration(config)
