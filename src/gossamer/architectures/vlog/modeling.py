"""The model: visual tokens, a text query and a retrieval token through a language model, and out as one vector."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import ModelOutput

from gossamer.architectures.vlog.configuration import VLogConfig
from gossamer.architectures.vlog.frame_adapter import FrameAdapter
from gossamer.core.errors import InputError
from gossamer.parts.contrastive import cosine_logits, matrix_loss
from gossamer.parts.front_end import (
    IGNORED,
    Projector,
    Spliced,
    embed_tokens,
    embedding_size,
    last_real,
    mean_real,
    splice,
    unpadded,
)

RANK, ALPHA = 16, 32  # of tune="lora"


@dataclasses.dataclass
class VLogOutput(ModelOutput):
    """``embedding`` [b, text_width] float32 of the retrieval methods, ``logits`` [b, t, V] of the generative one."""

    loss: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None


@dataclasses.dataclass
class Kept:
    """What a pass leaves for a longer question: keys and values, which places of them count [b, t] (None: all), and the
    token to put last [b, 1, H]."""

    cache: Any
    mask: Tensor | None
    retrieval: Tensor | None


class VLogModel(PreTrainedModel):
    """See :mod:`gossamer.architectures.vlog`. ``language_model`` is the body, with its head for "generative" only."""

    config_class = VLogConfig
    config: VLogConfig
    base_model_prefix = "vlog"
    main_input_name = "features"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VLogConfig) -> None:
        super().__init__(config)
        text = config.text_config
        generates = config.method == "generative"
        self.language_model = (AutoModelForCausalLM if generates else AutoModel).from_config(text)
        self.hidden = int(text.get_text_config().hidden_size)
        self.in_projector = Projector("linear", config.image_width, self.hidden, config.visual_tokens)
        if not generates:
            self.out_projector = nn.Linear(self.hidden, config.text_width)
        if config.method == "vlog" and config.retrieval_token == "learnable":
            self.retrieval = nn.Parameter(torch.zeros(self.hidden))
        if config.markers and config.method in ("vlog", "generative"):
            self.visual_markers = nn.Parameter(torch.zeros(2, self.hidden))
        if config.method == "adapter":
            self.frame_adapter = FrameAdapter(self.hidden)
        self.post_init()
        if config.tune == "lora":
            self._inject_lora()
        self._choose_trained()

    def forward(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        target_ids: Tensor | None = None,
        candidates: Tensor | None = None,
        **kwargs: Any,
    ) -> VLogOutput:
        """One vector a row, and the loss where there are targets.

        ``features`` [b, T, image_width] with ``feature_mask`` [b, T], ``input_ids`` and ``attention_mask`` [b, t]: the
        query, ended by EOS; padding on any side. ``targets`` [b, text_width] are the answers' text vectors, equal
        ``target_ids`` [b] mark equal texts. With ``candidates`` [c, text_width] (all labels of a closed set) ``labels``
        [b] are their rows. For "generative", ``input_ids`` hold the answer too, and ``labels`` [b, t] are -100 before.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.config.method == "generative":
            spliced = self._sequence(features, feature_mask, input_ids, attention_mask, labels=labels)
            found = self.language_model(**spliced.inputs(), use_cache=False)
            return VLogOutput(loss=found.loss, logits=_text_part(found.logits, spliced, attention_mask))
        embedding = self.embed(features, input_ids, attention_mask, feature_mask)
        return VLogOutput(loss=self._loss(embedding, targets, target_ids, candidates, labels), embedding=embedding)

    def embed(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
    ) -> Tensor:
        """Where in the text encoder's space the answer lies: [b, text_width], float32, not normalised."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        method = self.config.method
        if method == "vlog":
            spliced = self._sequence(features, feature_mask, input_ids, attention_mask, retrieval=True)
            hidden = self.language_model(**spliced.inputs(), use_cache=False).last_hidden_state
            return self.out_projector(last_real(hidden, spliced.attention_mask)).float()
        visual = self._visual(features, feature_mask)
        if method == "pool_query":
            words = embed_tokens(self.language_model, input_ids)
            rows = zip(visual, words, attention_mask.bool(), strict=True)
            pooled = torch.stack([torch.cat([block, row[real]]).mean(0) for block, row, real in rows])
        else:
            padded = nn.utils.rnn.pad_sequence(visual, batch_first=True)
            mask = torch.tensor([[place < len(row) for place in range(padded.shape[1])] for row in visual])
            mask = mask.to(padded.device)
            pooled = mean_real(self.frame_adapter(padded, mask) if method == "adapter" else padded, mask)
        return self.out_projector(pooled).float()

    @torch.no_grad()
    def embed_keeping(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """As :meth:`embed` (method "vlog"), with what :meth:`embed_on` needs for the same questions with more words."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        spliced = self._sequence(features, feature_mask, input_ids, mask, retrieval=True)
        found = self.language_model(**spliced.inputs(), use_cache=True)
        embedding = self.out_projector(last_real(found.last_hidden_state, spliced.attention_mask)).float()
        own = int(self.config.retrieval_token != "eos")
        lengths = spliced.attention_mask.sum(1)
        count = spliced.attention_mask.shape[1]
        last = spliced.inputs_embeds[torch.arange(len(lengths)), lengths - 1][:, None] if own else None
        # later words do not see the end of the question and the retrieval token
        plain = all(type(layer) is DynamicLayer for layer in found.past_key_values.layers)
        if plain and bool((lengths == count).all()):
            found.past_key_values.crop(-1 - own)
            return embedding, Kept(found.past_key_values, None, last)
        places = torch.arange(count, device=lengths.device)
        seen = (places < (lengths - 1 - own)[:, None]).to(spliced.attention_mask.dtype)
        return embedding, Kept(found.past_key_values, seen, last)

    @torch.no_grad()
    def embed_on(self, kept: Kept, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What :meth:`embed` gives for the same clips and questions with ``input_ids`` [b, t] after them.

        They are ended by EOS and padded on the right. Only the new tokens are computed; ``kept`` serves once.
        """
        words = embed_tokens(self.language_model, input_ids)
        rows = torch.arange(len(words), device=words.device)
        lengths = attention_mask.sum(1)
        if kept.retrieval is not None:
            words = torch.cat([words, torch.zeros_like(kept.retrieval)], dim=1)
            words[rows, lengths] = kept.retrieval[:, 0]
            lengths = lengths + 1
        counted: dict[str, Tensor] = {}
        if kept.mask is not None:
            mask = (torch.arange(words.shape[1], device=words.device) < lengths[:, None]).to(kept.mask.dtype)
            positions = kept.mask.sum(1, keepdim=True) + torch.arange(words.shape[1], device=words.device)
            counted = {"attention_mask": torch.cat([kept.mask, mask], dim=1), "position_ids": positions * mask}
        # without a mask the padding on the right is computed, and seen by nothing
        hidden = self.language_model(
            inputs_embeds=words, past_key_values=kept.cache, use_cache=True, **counted
        ).last_hidden_state
        return self.out_projector(hidden[rows, lengths - 1]).float()

    @torch.no_grad()
    def write(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 24,
        **settings: Any,
    ) -> Tensor:
        """Token by token, greedily (method "generative"): new ids [b, n]."""
        if self.config.method != "generative":
            raise InputError("vlog.write", must="be used with method='generative'", got=self.config.method)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        spliced = self._sequence(features, feature_mask, input_ids, mask, side="left")
        return self.language_model.generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **settings,
        )

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two rows of 6 frames, with queries of 7 and 4 tokens, and what their method needs for a loss."""
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(2, 6, self.config.image_width, generator=draw)
        vocabulary = int(self.config.text_config.get_text_config().vocab_size)
        ids = torch.randint(0, vocabulary, (2, 7), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        batch = {"features": features, "input_ids": ids, "attention_mask": mask}
        if self.config.method == "generative":
            return batch | {"labels": ids.masked_fill(torch.arange(7) < 2, IGNORED).masked_fill(mask == 0, IGNORED)}
        return batch | {
            "targets": torch.randn(2, self.config.text_width, generator=draw),
            "target_ids": torch.arange(2),
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def take(self, language_model: PreTrainedModel) -> None:
        """Copy a language model's weights, for "generative" its head too; new tokens start at the size of theirs."""
        source: Any = language_model if self.config.method == "generative" else language_model.base_model
        with torch.no_grad():
            if self.config.tune == "lora":
                own = {name: p for name, p in self.language_model.state_dict().items() if "lora_" not in name}
                for name, tensor in source.state_dict().items():
                    own[name if name in own else _wrapped(name)].copy_(tensor)
            else:
                self.language_model.load_state_dict(source.state_dict())
            # of size 1 for standardised features: much smaller ones drown in the layers' outputs, and learning stalls
            for parameter in self.in_projector.parameters():
                nn.init.normal_(parameter, std=self.config.image_width**-0.5 if parameter.dim() > 1 else 0.0)
            size = embedding_size(self.language_model)
            for name in ("retrieval", "visual_markers"):
                if hasattr(self, name):
                    nn.init.normal_(getattr(self, name), std=size)

    def merge(self) -> None:
        """Fold the LoRA of ``tune="lora"`` into the language model, which is then trained in full if at all."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, module in list(self.language_model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                self.language_model.set_submodule(path, module.get_base_layer())
        self.config.tune = "full"
        self._choose_trained()

    def _sequence(
        self,
        features: Tensor,
        feature_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        retrieval: bool = False,
        labels: Tensor | None = None,
        side: Any = "right",
    ) -> Spliced:
        """[visual][query][EOS][retrieval token], packed, padded on ``side``."""
        visual = self._visual(features, feature_mask)
        last = [self._retrieval_token(block) for block in visual] if retrieval else [None] * len(visual)
        if hasattr(self, "visual_markers"):
            visual = [torch.cat([self.visual_markers[:1], block, self.visual_markers[1:]]) for block in visual]
        embedded = embed_tokens(self.language_model, input_ids)
        if labels is None and bool(attention_mask.all()) and len({len(block) for block in visual}) == 1:
            parts = [torch.stack(visual).to(embedded), embedded]
            parts += [torch.stack([token for token in last if token is not None])] if last[0] is not None else []
            spliced = unpadded(torch.cat(parts, dim=1), visual=slice(visual[0].shape[0]))
        else:
            real = attention_mask.bool()
            words = [row[keep] for row, keep in zip(embedded, real, strict=True)]
            blocks = [[one] if end is None else [one, end] for one, end in zip(visual, last, strict=True)]
            places = [[0] if end is None else [0, len(row)] for end, row in zip(last, words, strict=True)]
            kept = None if labels is None else [row[keep] for row, keep in zip(labels, real, strict=True)]
            spliced = splice(words, blocks, places=places, labels=kept, side=side)
        limit = getattr(self.config.text_config.get_text_config(), "max_position_embeddings", None)
        length = spliced.attention_mask.shape[1]
        if limit is not None and length > limit:
            raise InputError(
                "vlog: frames and query",
                must=f"fit into the language model's {limit} positions",
                got=length,
                do="shorten the query, or lower max_frames",
            )
        return spliced

    def _retrieval_token(self, visual: Tensor) -> Tensor | None:
        """[1, H] to put last; None where it is the EOS."""
        if self.config.retrieval_token == "eos":
            return None
        return self.retrieval[None] if self.config.retrieval_token == "learnable" else visual.mean(0, keepdim=True)

    def _visual(self, features: Tensor, mask: Tensor | None) -> list[Tensor]:
        """For each row its visual tokens [n_i * visual_tokens, H]; at most ``max_frames`` frames."""
        if features.dim() != 3:
            raise InputError("vlog: features", must="be [rows, frames, width]", got=tuple(features.shape))
        if mask is None or bool(mask.all()):
            rows = list(features)
        else:
            rows = [row[keep] for row, keep in zip(features, mask.bool(), strict=True)]
        for number, row in enumerate(rows):
            if len(row) == 0:
                raise InputError(f"vlog: row {number}", must="have at least one frame", got="none")
        most = self.config.max_frames
        rows = [row if len(row) <= most else row[spread(len(row), most).to(row.device)] for row in rows]
        packed = torch.cat(rows)
        if not torch.isfinite(packed).all():
            raise InputError("vlog: features", must="be finite", got="NaN or infinity", do="compute them again")
        tokens = self.in_projector(packed.to(self.dtype))
        return list(tokens.split([len(row) * self.config.visual_tokens for row in rows]))

    def _loss(
        self,
        embedding: Tensor,
        targets: Tensor | None,
        target_ids: Tensor | None,
        candidates: Tensor | None,
        labels: Tensor | None,
    ) -> Tensor | None:
        tau = self.config.tau
        if candidates is not None:
            if labels is None:
                raise InputError("vlog: labels", must="say which candidates are right", got="none")
            return matrix_loss(cosine_logits(embedding, candidates, tau), labels, symmetric=False)
        if targets is None:
            return None
        equal = None
        if self.config.mask_equal and target_ids is not None:
            equal = target_ids[:, None] == target_ids[None, :]
        loss = matrix_loss(cosine_logits(embedding, targets, tau), None, self.config.symmetric, equal)
        # rows and columns are summed, not averaged
        return 2 * loss if self.config.symmetric else loss

    def _inject_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        from gossamer.parts.injection import is_transposed, projections, target_names

        found = projections(self.language_model)
        settings = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=target_names(self.language_model),  # type: ignore[arg-type]
            fan_in_fan_out=any(is_transposed(projection.module) for projection in found),
        )
        inject_adapter_in_model(settings, self.language_model)

    def _choose_trained(self) -> None:
        """Projectors and retrieval token always; of the language model what ``tune`` and ``method`` use."""
        self.requires_grad_(True)
        used = self.config.method in ("vlog", "generative")
        for name, parameter in self.language_model.named_parameters():
            if self.config.tune == "lora":
                parameter.requires_grad_(used and "lora_" in name)
            elif self.config.tune == "frozen" or not used:
                parameter.requires_grad_(False)
        if self.config.method == "pool_query" and self.config.tune == "full":
            self.get_input_embeddings().requires_grad_(True)


def spread(count: int, most: int) -> Tensor:
    """Rows that stand for ``count`` rows: all, or ``most`` of them at even distances, first and last included."""
    return torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).long()


def _text_part(logits: Tensor, spliced: Spliced, attention_mask: Tensor) -> Tensor:
    """Logits at the tokens' places [b, t, V] in the places that ``attention_mask`` gives them, 0 at its padding."""
    out = logits.new_zeros(*attention_mask.shape, logits.shape[-1])
    tokens = spliced.attention_mask.bool() & ~spliced.visual
    out[attention_mask.bool()] = logits[tokens]
    return out


def _wrapped(name: str) -> str:
    """Where LoRA keeps the weight ``name`` of a layer that it wraps."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.base_layer.{leaf}"
