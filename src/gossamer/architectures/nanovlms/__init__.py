"""NanoVLMs: vision-language models of 5 to 25 million parameters, trained from scratch on child-level descriptions.

A small vision transformer, a two-layer connector and a small causal decoder (equations in ``modeling``) learn end to
end, without pretraining, to describe images in words that three- to four-year-olds know. Such a vocabulary is small, so
that a small BPE leaves the parameters to the layers; descriptions are short (20-25 words) or long (60-70).

Presets (width; encoder and decoder blocks; heads of 64), of which the paper gives only the totals:

    mini    192   3 + 4      5M
    base    320   4 + 6     15M
    large   384   4 + 8     25M

Rows are ``{"image", "text"}``; ``processor`` trains its BPE on the texts it is given (``train_tokenizer``).
``grading`` holds the paper's rewriting prompt with its validator and the rubric (creativity, meaningfulness,
consistency) for any judge that is a callable; exact grades against scene facts stand in the experiment.

Where this differs: patches and positions start larger than transformers has them (``start_seeing``); GPT-4o as rewriter
and judge is any ``str -> str``; the split of parameters between encoder and decoder is chosen here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import ViTConfig

from gossamer.architectures.nanovlms.modeling import NanoVLMConfig, NanoVLMForConditionalGeneration, gpt2_config
from gossamer.architectures.nanovlms.processing import IMAGE, NanoVLMProcessor
from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.architectures import Architecture

CARD = Card(
    title="NanoVLMs: How small can we go and still make coherent Vision Language Models?",
    paper="2502.07838",
    year=2025,
    modality=("image", "text"),
    claim="trained from scratch at 5M parameters, states facts of the picture, where a text model of its size guesses",
    traits=("causal",),
    provides=("float_weights",),
    registers=("auto:nanovlms",),
    limits="COCO pictures and GPT-4o's grades are not shown here",
)

PRESETS = {"mini": (192, 3, 4), "base": (320, 4, 6), "large": (384, 4, 8)}


class NanoVLMsConfig(Config):
    preset: str = option("mini", "widths and depths: 5M, 15M or 25M parameters", choices=("mini", "base", "large"))
    image_size: int = option(224, "pixels a side", ge=8)
    patch_size: int = option(16, "pixels a side of a patch", ge=2)
    visual_tokens: str = option("cls", "what the decoder sees of an image", choices=("cls", "all", "pooled"))
    pooled: int = option(16, "visual tokens under visual_tokens: pooled, a square number", ge=1)
    vocabulary: int = option(5000, "tokens, the image token included", ge=64)
    max_length: int = option(128, "text tokens that have positions", ge=8)
    dropout: float = option(0.1, "in the connector and both transformers, while training", ge=0, lt=1)
    tied: bool = option(True, "the output head shares the embedding")


class NanoVLMs(Architecture):
    """Builds a model from a preset; what is built on is not used."""

    config_class = NanoVLMsConfig

    def build(self, base: Any = None) -> Any:
        options = self.config
        if options.image_size % options.patch_size:
            raise OptionError("nanovlms.image_size", must="be a multiple of patch_size", got=options.image_size)
        side = options.image_size // options.patch_size
        root = round(options.pooled**0.5)
        if options.visual_tokens == "pooled" and (root**2 != options.pooled or root > side):
            raise OptionError("nanovlms.pooled", must=f"be a square of at most {side**2}", got=options.pooled)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: Any = NanoVLMForConditionalGeneration(self._model_config())
            model.start_seeing()
        share = model.get_input_embeddings().weight.numel() * (1 if options.tied else 2) / model.num_parameters()
        if share > 0.5:
            warnings.warn(
                f"nanovlms: {share:.0%} of the parameters are embeddings; a vocabulary of {options.vocabulary} is more "
                f"than {options.preset} can pay, train a smaller one",
                stacklevel=3,
            )
        return model

    def _model_config(self) -> NanoVLMConfig:
        options = self.config
        width, encoder, decoder = PRESETS[options.preset]
        vision = ViTConfig(
            hidden_size=width, num_hidden_layers=encoder, num_attention_heads=width // 64, intermediate_size=4 * width,
            image_size=options.image_size, patch_size=options.patch_size, hidden_dropout_prob=options.dropout,
        )  # fmt: skip
        config = NanoVLMConfig(
            vision,
            visual_tokens=options.visual_tokens,
            pooled=options.pooled,
            connector_dropout=options.dropout,
            image_token_id=0,
        )
        config.text_config = gpt2_config(
            vocab_size=options.vocabulary, n_embd=width, n_layer=decoder,
            n_positions=config.visual_length + options.max_length,
            embd_pdrop=options.dropout, resid_pdrop=options.dropout, attn_pdrop=0.0,
            bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=options.tied,
        )  # fmt: skip
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(config.text_config, name))
        return config

    def processor(self, base: Any = None) -> NanoVLMProcessor:
        """``base``: a tokenizer that :func:`~gossamer.architectures.nanovlms.processing.train_tokenizer` made."""
        tokenizer = getattr(base, "tokenizer", base)
        if tokenizer is None or IMAGE not in tokenizer.get_vocab() or len(tokenizer) > self.config.vocabulary:
            raise InputError(
                "nanovlms.processor",
                must=f"get a tokenizer of at most {self.config.vocabulary} tokens that knows {IMAGE}",
                got="none" if tokenizer is None else f"one of {len(tokenizer)}",
                do="make one with gossamer.architectures.nanovlms.processing.train_tokenizer(texts, vocabulary)",
            )
        config = self._model_config()
        return NanoVLMProcessor.of(tokenizer, self.config.image_size, config.visual_length, self.config.max_length)
