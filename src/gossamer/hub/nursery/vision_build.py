"""Builds a vision-language model to be trained, and the optimizers that fit it.

A new Llama with a byte-level BPE of the world's words, or a pretrained language model with its vocabulary cut down to
them; the tower's weights come from its packaged model, the projector is aligned (``vision_alignment``).
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gossamer.hub.models import load_model
from gossamer.hub.nursery.vision import IMAGE_TOKEN, chat_template
from gossamer.hub.nursery.vision_alignment import align
from gossamer.hub.nursery.vision_data import SceneData, VisionSpec, image_processor
from gossamer.parts.vocabulary import trim_vocabulary

END, PAD = "<|endoftext|>", "<|pad|>"
BASE_IMAGE_TOKEN = "<start_of_image>"  # in Gemma's vocabulary, unused by its text models


def new_model(spec: VisionSpec, data: SceneData) -> tuple[Any, Any]:
    """A model ready to train, the tower in place, and its processor."""
    torch.manual_seed(spec.seed)
    text: Any
    tokenizer: Any
    text, tokenizer, image_token = _pretrained(spec, data) if spec.base else _llama(spec, data)
    tower: Any = load_model(spec.tower, dtype="float32")[0]
    ids = {key: getattr(text.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=spec.patches,
        vision_feature_layer=spec.tower_layer,
        vision_feature_select_strategy="default",
        **ids,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.generation_config.update(do_sample=False, **ids)
    align(model, tokenizer, data)
    processor = LlavaProcessor(
        image_processor=image_processor(spec.size),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=image_token,
        chat_template=chat_template(image_token),
    )
    return model.train(), processor


def _llama(spec: VisionSpec, data: SceneData) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[END, PAD, IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(data.texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=PAD, padding_side="left",
        extra_special_tokens={"image_token": IMAGE_TOKEN}, model_max_length=1024,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=spec.hidden, intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.02, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer, IMAGE_TOKEN


def _pretrained(spec: VisionSpec, data: SceneData) -> tuple[Any, Any, str]:
    """The base with its vocabulary cut down to the world's words; an unused special token stands for the image."""
    model, tokenizer = load_model(spec.base, dtype="float32", task="causal-lm")
    trimmed = trim_vocabulary(model, tokenizer, data.texts(), extra_tokens=(BASE_IMAGE_TOKEN,))
    trimmed.tokenizer.padding_side = "left"
    return trimmed.model, trimmed.tokenizer, BASE_IMAGE_TOKEN


def optimizers(spec: VisionSpec, trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a new text model's layers, AdamW for the rest and for low-rank adapters.

    On the first 200 steps of vlm-small Muon comes to the loss of AdamW at the same rate in a third of the steps. The
    aligned parts, projector and word embeddings, go at a tenth of the rate: at the full one they are soon anywhere, and
    what is not learned by then (colours) is not learned in 2000 steps.
    """
    inner = {name for name, value in trained.items() if value.ndim == 2 and ".layers." in name and not spec.lora}
    aligned = {name for name in trained if "multi_modal_projector" in name or "embed_tokens" in name}
    rest = [value for name, value in trained.items() if name not in inner | aligned]
    groups: list[dict[str, Any]] = [{"params": [trained[name] for name in sorted(aligned)], "share": 0.1}]
    groups += [{"params": rest, "share": 1.0}] if rest else []
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=spec.rate, betas=(0.9, 0.95), weight_decay=0.0)]
    if inner:
        options: Any = {"weight_decay": spec.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        matrices = [{"params": [trained[name] for name in sorted(inner)], "share": 1.0}]
        made.append(torch.optim.Muon(matrices, lr=spec.rate, **options))
    return made


def with_lora(spec: VisionSpec, model: Any) -> Any:
    """The language model with adapters on all its projections; frozen weights are kept in bfloat16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=spec.lora, lora_alpha=2 * spec.lora, target_modules="all-linear")
    language: Any = get_peft_model(model.model.language_model, config)
    model.model.language_model = language
    model.lm_head.requires_grad_(False)
    for module in language.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16 if spec.bfloat16 else torch.float32)
    return language
