"""What the distillation gives: an image classifier of a vision tower, prompts, projector and class vectors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from gossamer.compression.promptkd.clip import Clip, logits
from gossamer.core.errors import InputError
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.prompt_hooks import DeepPrompts, attach_prompts

_CHUNK = 64


class PromptKDClassifierConfig(PreTrainedConfig):
    """Shapes of :class:`PromptKDClassifier`; ``image_processor`` is the student's, as a dict.

    ``teacher`` is the fingerprint of the teacher whose text tower made the class vectors, ``text_prompts`` the shape
    (layers, tokens, width) of the prompts that it had, empty where it had none.
    """

    model_type = "promptkd"
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        class_names: Sequence[str] = ("a", "b"),
        width: int = 768,
        visual_tokens: int = 4,
        depth: int = 9,
        projector_layers: int = 2,
        scale: float = 100.0,
        image_processor: dict[str, Any] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        teacher: str = "",
        text_prompts: Sequence[int] = (),
        **rest: Any,
    ) -> None:
        self.vision_config = CLIPVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.vision_config = self.vision_config or CLIPVisionConfig()
        self.width, self.visual_tokens, self.depth = width, visual_tokens, depth
        self.projector_layers, self.scale, self.image_processor = projector_layers, scale, image_processor
        self.templates, self.teacher, self.text_prompts = list(templates), teacher, list(text_prompts)
        rest["id2label"] = dict(enumerate(class_names))
        rest["label2id"] = {name: number for number, name in enumerate(class_names)}
        super().__init__(**rest)
        self.class_names = list(class_names)


class PromptKDClassifier(PreTrainedModel):
    """``logits = s * z W^T`` with z the unit-length projected feature [n, D_T] of the prompted vision tower."""

    config_class = PromptKDClassifierConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ["CLIPEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: PromptKDClassifierConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.tower = CLIPVisionModelWithProjection(vision)
        self.prompts = DeepPrompts(vision.hidden_size, tokens=config.visual_tokens, depth=config.depth)
        self.projector = projector(vision.projection_dim, config.width, config.projector_layers)
        self.register_buffer("class_vectors", torch.zeros(len(config.class_names), config.width))
        self.register_buffer("text_prompts", torch.zeros(*config.text_prompts) if config.text_prompts else None)
        self.class_vectors: Tensor
        self.text_prompts: Tensor | None
        attach_prompts(self.tower, "vision", self.prompts)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **rest: Any) -> ImageClassifierOutput:
        """``pixel_values [n, 3, s, s]``; logits float32 [n, C], and the cross-entropy where ``labels [n]`` come."""
        features = self.tower(pixel_values=pixel_values.to(self.device, self.dtype)).image_embeds
        seen = normalize(self.projector(features).float(), dim=-1)
        found = logits(self.config.scale, seen, self.class_vectors)
        loss = cross_entropy(found, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=found)

    @torch.no_grad()
    def predict(self, images: Sequence[Any] | Tensor) -> Tensor:
        """Probabilities [n, C] of ``config.class_names``, always in evaluation mode.

        ``images``: PIL images, uint8 arrays [h, w, 3] or paths, or pixels [n, 3, s, s] that are processed already.
        """
        mode = self.training
        self.eval()
        try:
            if not isinstance(images, Tensor):
                images = self._clip().pixels(images)
            chunks = images.split(_CHUNK)
            return torch.cat([self(chunk).logits.softmax(-1) for chunk in chunks])
        finally:
            self.train(mode)

    def add_classes(self, names: Sequence[str], teacher: Any) -> None:
        """Add classes after training. Their vectors need the text tower of the teacher once.

        ``teacher``: the bundle (model and processor) that the classifier was distilled from; another one is refused, as
        are names that are empty or known.
        """
        known = list(self.config.class_names)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise InputError("add_classes", must="get names that are not empty", got=repr(names))
        twice = sorted({name for name in names if name in known or list(names).count(name) > 1})
        if twice:
            raise InputError("add_classes", must="get new names, each once", got=twice)
        clip = Clip(teacher, where="add_classes: teacher")
        if not clip.speaks:
            raise InputError(clip.where, must="have a text tower and a tokenizer", do="give Bundle(model, processor)")
        if fingerprint(clip.model) != self.config.teacher:
            raise InputError(
                clip.where, must=f"be the one that made the class vectors ({self.config.teacher})",
                got=fingerprint(clip.model), do="give that teacher, or distil again",
            )  # fmt: skip
        prompts = stored_prompts(self.text_prompts)
        with clip.frozen(), clip.prompted(prompts, None):
            vectors = clip.class_vectors([*known, *names], self.config.templates, distinct=True)[len(known) :]
        self.class_vectors = torch.cat([self.class_vectors, vectors.to(self.class_vectors)])
        self.config.class_names = [*known, *names]
        self.config.id2label = dict(enumerate(self.config.class_names))
        self.config.label2id = {name: number for number, name in enumerate(self.config.class_names)}

    def _clip(self) -> Clip:
        stored = self.config.image_processor
        return Clip(self.tower, CLIPImageProcessorPil(**stored) if stored else None)


def projector(own: int, width: int, layers: int) -> nn.Module:
    """1x1 convolution, batch norm, ReLU, 1x1 convolution from D_S to D_T; on vectors, these are linear layers."""
    if layers == 1:
        return nn.Linear(own, width)
    return nn.Sequential(nn.Linear(own, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))


def stored_prompts(vectors: Tensor | None) -> DeepPrompts | None:
    """Prompts with ``vectors [J, M, d]``."""
    if vectors is None:
        return None
    depth, tokens, width = vectors.shape
    prompts = DeepPrompts(width, tokens=tokens, depth=depth).requires_grad_(False)
    prompts.vectors.data.copy_(vectors)
    return prompts


AutoConfig.register(PromptKDClassifierConfig.model_type, PromptKDClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(PromptKDClassifierConfig, PromptKDClassifier, exist_ok=True)
