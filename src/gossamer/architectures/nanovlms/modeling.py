"""The model of nanovlms: a vision transformer, a connector and a causal decoder, all from scratch.

    X = ViT(image) [b, 1 + p, d_v]          p patches and the class token, after the final norm
    v = select(X) [b, n, d_v]               the class token, all patches, or patches pooled to n
    z = W_2 GELU(W_1 v) [b, n, d_t]         W_1: d_v -> 4 d_v, W_2: 4 d_v -> d_t, dropout after
    p(w_t | w_<t, image) = decoder([z, e(w_1), ..., e(w_t-1)])

Visual tokens take the places of ``image_token_id`` in ``input_ids``, so training, cached generation and scoring all run
the one forward below.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from gossamer.core.errors import InputError
from gossamer.parts.front_end import IGNORED, positions

Select = Literal["cls", "all", "pooled"]


class NanoVLMConfig(PreTrainedConfig):
    """``visual_tokens`` says what of the encoder the decoder sees; ``pooled`` is n for "pooled" (a square number)."""

    model_type = "nanovlms"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": ViTConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        visual_tokens: Select = "cls",
        pooled: int = 16,
        connector_dropout: float = 0.1,
        image_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config if isinstance(vision_config, ViTConfig) else ViTConfig(**vision_config or {})
        self.text_config = text_config if isinstance(text_config, PreTrainedConfig) else _text_config(text_config or {})
        self.visual_tokens, self.pooled = visual_tokens, pooled
        self.connector_dropout, self.image_token_id = connector_dropout, image_token_id
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs.setdefault("tie_word_embeddings", False)  # the decoder ties its own
        super().__init__(**kwargs)

    @property
    def patches(self) -> int:
        image: Any = self.vision_config.image_size
        patch: Any = self.vision_config.patch_size
        return int(image // patch) ** 2

    @property
    def visual_length(self) -> int:
        """n, the visual tokens of one image."""
        return {"cls": 1, "all": self.patches, "pooled": self.pooled}[self.visual_tokens]


def _text_config(values: dict[str, Any]) -> PreTrainedConfig:
    kind = values.get("model_type", "gpt2")
    return AutoConfig.for_model(**{**values, "model_type": kind})


class NanoVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = NanoVLMConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: NanoVLMConfig) -> None:
        super().__init__(config)
        wide, narrow = config.vision_config.hidden_size, config.text_config.hidden_size
        self.encoder = AutoModel.from_config(config.vision_config, add_pooling_layer=False)
        self.connector = nn.Sequential(
            nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, narrow), nn.Dropout(config.connector_dropout)
        )
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def start_seeing(self) -> None:
        """Patches and positions at eight to ten times transformers' start.

        At its 0.02 a new encoder's states hardly differ between images, and captions are learned without them first.
        """
        embeddings = self.encoder.embeddings
        embeddings.patch_embeddings.projection.weight.mul_(8.0)
        embeddings.position_embeddings.normal_(0.0, 0.2)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [b, n, d_t] of images [b, 3, h, w]."""
        states = self.encoder(pixel_values=pixel_values).last_hidden_state
        return self.connector(self._select(states))

    def _select(self, states: Tensor) -> Tensor:
        if self.config.visual_tokens == "cls":
            return states[:, :1]
        patches = states[:, 1:]
        if self.config.visual_tokens == "all":
            return patches
        side, target = round(patches.shape[1] ** 0.5), round(self.config.pooled**0.5)
        board = patches.transpose(1, 2).unflatten(-1, (side, side))
        return nn.functional.adaptive_avg_pool2d(board, target).flatten(-2).transpose(1, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, V] and, with ``labels`` [b, t] (-100: no loss), the mean cross-entropy of the next token."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = positions(attention_mask)
        found = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
        )
        loss = None
        if labels is not None:
            targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
            loss = nn.functional.cross_entropy(
                found.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            )
        return CausalLMOutputWithPast(loss=loss, logits=found.logits, past_key_values=found.past_key_values)

    def _with_images(self, input_ids: Tensor | None, embeds: Tensor, pixel_values: Tensor) -> Tensor:
        if input_ids is None:
            raise InputError(
                "nanovlms",
                must="get input_ids with pixel_values",
                got="inputs_embeds",
                do="use the processor",
            )
        places = input_ids == self.config.image_token_id
        visual = self.image_features(pixel_values)
        if int(places.sum()) != visual.shape[0] * visual.shape[1]:
            raise InputError(
                "nanovlms: image tokens",
                must=f"be {self.config.visual_length} for each of {len(visual)} images",
                got=int(places.sum()),
                do="let this model's own processor make the batch",
            )
        return embeds.masked_scatter(places.unsqueeze(-1), visual.to(embeds.dtype))

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pixel_values = kwargs.pop("pixel_values", None)
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(self, input_ids, *args, **kwargs)
        started = inputs["input_ids"] is not None and inputs["input_ids"].shape[1] < input_ids.shape[1]
        inputs["pixel_values"] = None if started else pixel_values  # the cache holds the image from then on
        return inputs

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two captioned images, one caption shorter and padded on the right."""
        config, text = self.config, self.config.text_config
        generator = torch.Generator().manual_seed(0)
        side, image = config.vision_config.image_size, config.image_token_id
        words = [torch.randint(3, text.vocab_size, (count,), generator=generator) for count in (9, 6)]
        lead = torch.full((config.visual_length,), image)
        rows = [torch.cat([lead, row.where(row != image, row - 1)]) for row in words]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=text.pad_token_id or 0)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = ids.where(mask.bool() & (ids != image), torch.tensor(IGNORED))
        pixels = torch.randn(2, 3, side, side, generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


AutoConfig.register("nanovlms", NanoVLMConfig)
AutoModelForImageTextToText.register(NanoVLMConfig, NanoVLMForConditionalGeneration)


def gpt2_config(**values: Any) -> GPT2Config:
    """The decoder of the paper: learned positions, pre-norm blocks, GELU, a final norm; heads of 64."""
    return GPT2Config(**values, n_head=max(1, values["n_embd"] // 64))
