"""A CLIP with its processor, and few-shot learning of its prompts (CoOp, IVLP, PromptSRC)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, l1_loss, normalize
from transformers import CLIPImageProcessorPil, CLIPModel

from gossamer.compression.promptkd.domain import Crop, Domain, batches, draw_crop, open_image
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.parts.prompt_hooks import DeepPrompts, attach_prompts, encoder_layers, find_tower

_TEXT_WEIGHT, _IMAGE_WEIGHT = 25.0, 10.0  # of PromptSRC's distances to the frozen features
_GAUSS_MEAN, _GAUSS_STD = 0.75, 0.05  # of its epoch weights, in shares of all epochs: 15 and 1 of 20
_WARM_RATE = 1e-5
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Training:
    """SGD with momentum 0.9 and weight decay 5e-4; the first epoch at 1e-5, then a cosine over all epochs."""

    epochs: int = 20
    batch: int = 8
    lr: float = 0.005
    augment: bool = True
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """A single epoch has no warm-up, or nothing would be learnt."""
        if epoch == 0 and self.epochs > 1:
            return _WARM_RATE
        return self.lr * (1 + math.cos(math.pi * max(0, epoch - 1) / self.epochs)) / 2

    def run(
        self,
        parameters: Sequence[nn.Parameter],
        count: int,
        loss: Callable[[list[int], torch.Generator], Tensor],
        after: Callable[[int], None] = lambda epoch: None,
    ) -> list[float]:
        """Minimise ``loss(indices, generator)`` over epochs of ``count`` items; the mean loss of each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=5e-4)
        curve = []
        for epoch in range(self.epochs):
            optimizer.param_groups[0]["lr"] = self.rate(epoch)
            values = []
            for rows in batches(count, self.batch, generator):
                value = loss(rows.tolist(), generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                torch.clear_autocast_cache()  # or a caller's autocast goes on with the weights of the first step
                values.append(float(value.detach()))
            curve.append(sum(values) / len(values))
            if not math.isfinite(curve[-1]):
                raise InputError("promptkd.lr", must="keep the loss finite", got=self.lr, do="lower lr or weight")
            after(epoch)
        return curve


class Clip:
    """``model`` (a CLIPModel, or a vision tower with projection where no text is asked for) with its processor."""

    def __init__(self, given: Any, processor: Any = None, *, where: str = "CLIP") -> None:
        if isinstance(given, Bundle):
            given, processor = given.model, given.processor or processor
        self.model, self.processor, self.where = given, processor, where
        self.tokenizer: Any = getattr(processor, "tokenizer", processor if hasattr(processor, "bos_token_id") else None)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        if self.image_processor is None:
            side = find_tower(given, "vision").config.image_size
            self.image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
        self.size: int = find_tower(given, "vision").config.image_size
        self.text: DeepPrompts | None = None
        self.vision: DeepPrompts | None = None

    @property
    def speaks(self) -> bool:
        """Whether it has a text tower and a tokenizer."""
        return isinstance(self.model, CLIPModel) and self.tokenizer is not None

    @property
    def scale(self) -> float:
        """s = exp(logit_scale)."""
        return float(self.model.logit_scale.detach().float().exp())

    def pixels(self, images: Sequence[Any], crops: Sequence[Crop] | None = None) -> Tensor:
        """float32 [n, 3, size, size] by its own image processor; ``crops`` are cut out of the images before."""
        opened = [open_image(image) for image in images]
        if crops is not None:
            opened = [
                image if crop.whole else crop.of(image, self.size) for image, crop in zip(opened, crops, strict=True)
            ]
        pixels: Tensor = self.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return pixels

    def encode(self, pixels: Tensor) -> Tensor:
        """Image features of unit length, float32 [n, d]."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        if isinstance(self.model, CLIPModel):
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        else:
            features = self.model(pixel_values=pixels).image_embeds
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_all(self, images: Sequence[Any]) -> Tensor:
        """:meth:`encode` in chunks, on whole images."""
        chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
        return torch.cat([self.encode(self.pixels(chunk)) for chunk in chunks])

    def ids(self, names: Sequence[str], template: str, slots: int = 0) -> Tensor:
        """Ids [n, t] of ``template`` with each name, between start and end token, filled up with end tokens.

        The ``slots`` places after the start token are for prompts: the template's first words, and where those are too
        few, placeholders before them.
        """
        token, context = self.tokenizer, template.split("{}")[0].strip()
        before = token(context, add_special_tokens=False)["input_ids"] if context else []
        rows = token([template.format(name) for name in names], add_special_tokens=False)["input_ids"]
        holders = [rows[0][0]] * max(0, slots - len(before))
        rows = [[token.bos_token_id, *holders, *row, token.eos_token_id] for row in rows]
        width, room = max(map(len, rows)), find_tower(self.model, "text").config.max_position_embeddings
        if width > room:
            longest = max(zip(map(len, rows), names, strict=True))[1]
            raise InputError(f"{self.where}: class name {longest!r}", must=f"fit {room} tokens", got=f"{width}")
        filled = torch.tensor([row + [token.eos_token_id] * (width - len(row)) for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows])
        if not torch.equal(self._pooled_at(filled), ends):
            raise InputError(
                f"{self.where}: text tower", must="pool at the end token", got=f"one with id {token.eos_token_id}",
                do="give the tokenizer that the model was trained with",
            )  # fmt: skip
        return filled.to(self.model.device)

    def _pooled_at(self, ids: Tensor) -> Tensor:
        """Where the text tower pools: the first end token, in configs with the id 2 the first highest id."""
        end = find_tower(self.model, "text").config.eos_token_id
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def describe(self, ids: Tensor) -> Tensor:
        """Text features of unit length, float32 [n, d]."""
        return normalize(self.model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def class_vectors(self, names: Sequence[str], templates: Sequence[str], *, distinct: bool = False) -> Tensor:
        """W [C, d], rows of unit length: with text prompts from the first template, else the mean over all.

        ``distinct`` refuses names that get one and the same vector.
        """
        if self.text is not None:
            vectors = self.describe(self.ids(names, templates[0], self.text.tokens))
        else:
            each = [self.describe(self.ids(names, template)) for template in templates]
            vectors = normalize(torch.stack(each).mean(0), dim=-1)
        near = torch.triu(vectors @ vectors.T, diagonal=1)
        if distinct and near.max() > 1 - 1e-6:
            one, other = divmod(int(near.argmax()), len(names))
            raise InputError(
                f"{self.where}: class names {names[one]!r} and {names[other]!r}",
                must="be told apart by its tokenizer and text tower",
                got="one vector for both",
                do="rename one of them",
            )
        return vectors

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode and asks for no gradients; after, all is as before."""
        modes = {module: module.training for module in self.model.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, want in wanted.items():
                parameter.requires_grad_(want)

    @contextlib.contextmanager
    def prompted(self, text: DeepPrompts | None, vision: DeepPrompts | None) -> Iterator[None]:
        """Inside, the towers have these prompts."""
        self.text, self.vision = text, vision
        given = [(side, prompts) for side, prompts in (("text", text), ("vision", vision)) if prompts is not None]
        hooks = [attach_prompts(self.model, side, prompts) for side, prompts in given]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.text = self.vision = None

    @contextlib.contextmanager
    def unprompted(self) -> Iterator[None]:
        """Inside, the prompts are off."""
        with contextlib.ExitStack() as stack:
            for prompts in filter(None, (self.text, self.vision)):
                stack.enter_context(prompts.off())
            yield


def logits(scale: float, features: Tensor, vectors: Tensor) -> Tensor:
    """``s u W^T`` [n, C] in float32, under autocast too: at s = 100 half precision would move them by whole units."""
    with torch.autocast(features.device.type, enabled=False):
        return scale * features.float() @ vectors.float().T


def divergence(teacher: Tensor, student: Tensor, tau: float = 1.0) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)), summed and divided by n * C; ``[n, C]`` logits."""
    target, guess = (torch.log_softmax(values.float() / tau, dim=-1) for values in (teacher, student))
    return kl_div(guess, target, reduction="sum", log_target=True) / teacher.numel()


def crops_of(images: Sequence[Any], augment: bool, generator: torch.Generator) -> list[Crop]:
    """A random crop of each image, or the whole of it."""
    return [draw_crop(open_image(image), generator) if augment else Crop() for image in images]


def learn_prompts(
    clip: Clip, domain: Domain, method: str, *, tokens: int, depth: int, training: Training
) -> tuple[DeepPrompts | None, DeepPrompts | None]:
    """Text and vision prompts of ``clip`` from the labelled shots, over their classes; the model stays as it was.

    ``coop`` learns text vectors of the first layer by cross-entropy, ``ivlp`` vectors of both towers in ``depth``
    layers, ``promptsrc`` these with distances to the frozen model and Gaussian weights over the epochs; ``none``
    nothing.
    """
    if method == "none":
        return None, None
    if not domain.shots:
        raise InputError(
            f"{clip.where}: teacher_prompt {method!r}", must="have labelled shots", got="none",
            do="give shots in data, or teacher_prompt none",
        )  # fmt: skip
    if len(domain.base) < 2:
        raise InputError(f"{clip.where}: shots", must="be of at least 2 classes", got=len(domain.base))
    text, vision = _start(clip, domain, method, tokens, depth, training.seed)
    names = [domain.class_names[label] for label in domain.base]
    images = [image for image, _ in domain.shots]
    labels = torch.tensor([domain.base.index(label) for _, label in domain.shots], device=clip.model.device)
    for prompts in filter(None, (text, vision)):
        prompts.to(clip.model.device)
    parameters = [prompts.vectors for prompts in (text, vision) if prompts is not None]
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    weights = gaussian_weights(training.epochs)

    with clip.frozen():
        ids = clip.ids(names, domain.templates[0], text.tokens)
        frozen = clip.class_vectors(names, domain.templates)

        def loss(rows: list[int], generator: torch.Generator) -> Tensor:
            chosen = [images[row] for row in rows]
            pixels = clip.pixels(chosen, crops_of(chosen, training.augment, generator))
            described, seen = clip.describe(ids), clip.encode(pixels)
            guess = logits(clip.scale, seen, described)
            value = cross_entropy(guess, labels[rows])
            if method != "promptsrc":
                return value
            with torch.no_grad(), clip.unprompted():
                before = clip.encode(pixels)
            return value + self_regulation(guess, described, seen, frozen, before, clip.scale)

        def after(epoch: int) -> None:
            for total, parameter in zip(mean, parameters, strict=True):
                total.add_(parameter.detach(), alpha=weights[epoch])

        with clip.prompted(text, vision):
            training.run(parameters, len(images), loss, after)
    if method == "promptsrc":
        for total, parameter in zip(mean, parameters, strict=True):
            parameter.data.copy_(total)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return text, vision


def self_regulation(
    guess: Tensor, described: Tensor, seen: Tensor, frozen_text: Tensor, frozen_image: Tensor, scale: float
) -> Tensor:
    """PromptSRC's 25 L1(text) + 10 L1(image) + KL(frozen logits || logits) / numel; features of unit length."""
    before = logits(scale, frozen_image, frozen_text)
    near = _TEXT_WEIGHT * l1_loss(described, frozen_text) + _IMAGE_WEIGHT * l1_loss(seen, frozen_image)
    return near + divergence(before, guess)


def gaussian_weights(epochs: int) -> list[float]:
    """Weights of the epochs' prompts, N(0.75 E, (0.05 E)^2) at 1 ... E, normalised to sum 1."""
    mean, std = _GAUSS_MEAN * epochs, max(_GAUSS_STD * epochs, 0.5)
    raw = [math.exp(-(((epoch + 1 - mean) / std) ** 2) / 2) for epoch in range(epochs)]
    return [value / sum(raw) for value in raw]


def _start(
    clip: Clip, domain: Domain, method: str, tokens: int, depth: int, seed: int
) -> tuple[DeepPrompts, DeepPrompts | None]:
    """Text vectors begin as the embeddings of the template's words, all else as N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    towers = {side: find_tower(clip.model, side) for side in ("text", "vision")}
    deep = {side: min(depth, len(encoder_layers(tower))) if method != "coop" else 1 for side, tower in towers.items()}
    width = {side: tower.config.hidden_size for side, tower in towers.items()}
    text = DeepPrompts(width["text"], tokens=tokens, depth=deep["text"], generator=generator)
    context = domain.templates[0].split("{}")[0].strip()
    words = clip.tokenizer(context, add_special_tokens=False)["input_ids"][:tokens] if context else []
    if words:
        own = towers["text"].get_input_embeddings().weight.detach()[words]
        text.vectors.data[0, tokens - len(words) :] = own.float().cpu()
    if method == "coop":
        return text, None
    return text, DeepPrompts(width["vision"], tokens=tokens, depth=deep["vision"], generator=generator)
