"""PromptKD: a large prompted CLIP labels a domain's unlabelled images softly, a small CLIP's prompts learn from it.

Li et al. 2024 (CVPR, arXiv 2403.02781). Names of C classes are known, of which some (base) may have a few labels.

A. The teacher learns prompts from the labelled shots (``teacher_prompt``: PromptSRC, IVLP or CoOp; see clip.py), or
   stays as it is (``none``).
B. Its text tower runs once over all names: ``W [C, D_T]``, rows of unit length, the classifier of both.
C. The teacher's image feature u^ [D_T] and the student's projected one, z = h(f_S(x)), z^ = z / |z|, give

       q_T = softmax(s_T u^ W^T / tau)     q_S = softmax(s_S z^ W^T / tau)       s = exp(logit_scale), both frozen
       loss = weight * tau^2 * KL(q_T || q_S), summed over images and classes and divided by their number B * C

   over the student's deep visual prompts and the projector h: D_S -> D_T (linear, batch norm, ReLU, linear). The sum
   is divided by B * C and not by B, so that weight is to be in the hundreds. No label is used here.

The result is an image classifier of its own class (vision tower, prompts, h, W), which needs no text tower and no
teacher; a class that comes later needs the teacher's text tower once (``add_classes``). ``tune`` "all" trains the whole
student tower too, an upper reference. Without ``augment`` the teacher sees every image once only.

Different from the paper: the last epoch counts, while the original's code picks a checkpoint by test accuracy;
``depth`` beyond a tower's layers means all of them; MaPLe as the teacher's method is not here. Rate, momentum 0.9,
weight decay 5e-4 and the warm-up epoch at 1e-5 are the original's, alike for teacher and student.
"""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from gossamer.compression.promptkd.clip import Clip, Training, crops_of, divergence, learn_prompts, logits
from gossamer.compression.promptkd.domain import Domain
from gossamer.compression.promptkd.student import PromptKDClassifier, PromptKDClassifierConfig
from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Compressed, Compression, CompressionReport, held_bytes
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.prompt_hooks import DeepPrompts, find_tower

CARD = Card(
    title="PromptKD",
    paper="2403.02781",
    year=2024,
    modality=("image", "text"),
    claim="unlabelled distillation from a prompted teacher beats few-shot prompt learning in harmonic mean accuracy, "
    "most on classes without labels",
    traits=("distils",),
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("trained",),
    registers=("auto:promptkd",),
    families=("clip",),
    limits="the eleven data sets and the teacher CLIP ViT-L/14 are not at hand; MaPLe teachers are not built",
)

PARTS = ("text_prompts", "vision_prompts")


class PromptKDConfig(Config):
    teacher: str = option("teacher", "the large CLIP, with its processor", companion=True)
    teacher_prompt: str = option(
        "promptsrc", "how the teacher learns from the shots", choices=("none", "coop", "ivlp", "promptsrc")
    )
    tokens: int = option(4, "prompt vectors a layer, of each tower that has prompts", ge=1)
    depth: int = option(9, "layers with prompts of their own; at most all of a tower", ge=1)
    projector_layers: int = option(2, "linear layers from student to teacher width", choices=(1, 2))
    tune: str = option("prompts", "what the student trains beside the projector", choices=("prompts", "all"))
    tau: float = option(1.0, "temperature of both distributions", gt=0)
    weight: float = option(1000.0, "factor of the divergence; 200 for small fine-grained sets", gt=0)
    lr: float = option(0.005, "learning rate of both trainings after the first epoch", gt=0)
    epochs: int = option(20, "epochs of the teacher's and the student's training", ge=1)
    batch: int = option(8, "images a step", ge=2)
    augment: bool = option(True, "random crops and mirroring; without, the teacher's features are kept")


class PromptKD(Compression):
    """Distils companion ``teacher`` into the vision tower of a small CLIP, on images of a domain."""

    config_class = PromptKDConfig

    def check(self, model: nn.Module, data: Any = None) -> None:
        """Refuse models without the towers, a teacher that cannot read, and a domain without names or images."""
        super().check(model, data)
        if not isinstance(model, CLIPModel | CLIPVisionModelWithProjection):
            raise InputError(
                f"{self.name}: student", must="be a CLIPModel or its vision tower with projection",
                got=type(model).__name__,
            )  # fmt: skip
        domain = Domain.read(data, self.name)
        given = self.companion(self.config.teacher)
        given = given.model if isinstance(given, Bundle) else given
        if not isinstance(given, CLIPModel):
            raise InputError(f"{self.name}: teacher", must="be a CLIPModel", got=type(given).__name__)
        if self._teacher(domain).tokenizer is None:
            raise InputError(
                f"{self.name}: teacher", must="come with its tokenizer", got="a model alone",
                do="give Bundle(model, processor) as companion, or the student's processor in data",
            )  # fmt: skip
        ready = prompts_of(self.companion(self.config.teacher)) is not None
        if not (domain.shots or ready or self.config.teacher_prompt == "none"):
            raise InputError(
                f"{self.name}: teacher_prompt {self.config.teacher_prompt!r}", must="have labelled shots", got="none",
                do="give shots in data, or set teacher_prompt to none",
            )  # fmt: skip

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """``data``: see :class:`~gossamer.compression.promptkd.domain.Domain`; ``model`` and teacher stay as they are.

        The report's values: accuracies on ``held_out`` (base, novel, harmonic mean; of student, teacher and result),
        parameters, trained parameters, agreement with the teacher, loss by epoch, and warnings.
        """
        domain, config = Domain.read(data, self.name), self.config
        teacher = self._teacher(domain)
        student = Clip(model, domain.processor, where=f"{self.name}: student")
        ready = prompts_of(self.companion(config.teacher))
        text, vision = ready or learn_prompts(
            teacher, domain, config.teacher_prompt, tokens=config.tokens, depth=config.depth, training=self._training()
        )
        with torch.random.fork_rng(devices=[]), teacher.frozen():
            torch.manual_seed(self.seed)
            with teacher.prompted(text, vision):
                vectors = teacher.class_vectors(domain.class_names, domain.templates, distinct=True)
                result = self._start(student, teacher, vectors, domain, text)
                curve, guessed = self._distil(result, student, teacher, vectors, domain)
                result.to(model.dtype)
                prompted = _scores(teacher, vectors, domain)
        values: dict[str, Any] = {
            "classes": len(domain.class_names),
            "parameters_before": sum(parameter.numel() for parameter in model.parameters()),
            "parameters": sum(parameter.numel() for parameter in result.parameters()),
            "trained_parameters": sum(p.numel() for p in result.parameters() if p.requires_grad),
            "losses": curve,
            "agreement_with_teacher": float((result.predict(domain.images).argmax(-1) == guessed).float().mean()),
        }
        values |= self._accuracies(result, student, teacher, prompted, domain)
        result.requires_grad_(True)
        return Compressed(result, CompressionReport(held_bytes(model), held_bytes(result), values=values))

    def prompt_teacher(self, data: Any) -> Bundle:
        """Stage A alone: the companion with the prompts that it learnt from ``data`` in ``parts``.

        Given as companion, such a bundle skips stage A, so that one prompted teacher serves many students.
        """
        domain = Domain.read(data, self.name)
        teacher = self._teacher(domain)
        learnt = learn_prompts(
            teacher, domain, self.config.teacher_prompt, tokens=self.config.tokens, depth=self.config.depth,
            training=self._training(),
        )  # fmt: skip
        return Bundle(teacher.model, teacher.processor, parts=dict(zip(PARTS, learnt, strict=True)))

    def _training(self) -> Training:
        config = self.config
        return Training(config.epochs, config.batch, config.lr, config.augment, self.seed)

    def _teacher(self, domain: Domain) -> Clip:
        fallback = getattr(domain.processor, "tokenizer", None)
        return Clip(self.companion(self.config.teacher), fallback, where=f"{self.name}: teacher")

    def _start(
        self, student: Clip, teacher: Clip, vectors: Tensor, domain: Domain, text: DeepPrompts | None
    ) -> PromptKDClassifier:
        """The classifier with the student's weights, what is to be trained asking for gradients."""
        config, model = self.config, student.model
        tower, width = find_tower(model, "vision"), model.visual_projection.out_features
        vision = CLIPVisionConfig(**{**tower.config.to_dict(), "projection_dim": width})
        result = PromptKDClassifier(
            PromptKDClassifierConfig(
                vision_config=vision,
                class_names=domain.class_names,
                width=vectors.shape[1],
                visual_tokens=config.tokens,
                depth=min(config.depth, vision.num_hidden_layers),
                projector_layers=config.projector_layers,
                scale=student.scale if isinstance(model, CLIPModel) else teacher.scale,
                image_processor=student.image_processor.to_dict(),
                templates=domain.templates,
                teacher=fingerprint(teacher.model),
                text_prompts=tuple(text.vectors.shape) if text is not None else (),
            )
        )
        find_tower(result, "vision").load_state_dict(tower.state_dict())
        result.tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
        for module in result.projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()  # transformers starts linear layers otherwise
        result.class_vectors.copy_(vectors)
        if text is not None and result.text_prompts is not None:
            result.text_prompts.copy_(text.vectors)
        result.tower.requires_grad_(config.tune == "all")
        result.to(model.device)
        return result

    def _distil(
        self, result: PromptKDClassifier, student: Clip, teacher: Clip, vectors: Tensor, domain: Domain
    ) -> tuple[list[float], Tensor]:
        """Stage C; the losses by epoch and the teacher's class of each whole image."""
        config = self.config
        known = logits(teacher.scale, teacher.encode_all(domain.images), vectors)

        def loss(rows: list[int], generator: torch.Generator) -> Tensor:
            images = [domain.images[row] for row in rows]
            crops = crops_of(images, config.augment, generator)
            target = known[rows]
            if config.augment:
                with torch.no_grad():
                    target = logits(teacher.scale, teacher.encode(teacher.pixels(images, crops)), vectors)
            guess = result(student.pixels(images, crops)).logits
            return config.weight * config.tau**2 * divergence(target, guess, config.tau)

        result.train()
        free = [parameter for parameter in result.parameters() if parameter.requires_grad]
        curve = self._training().run(free, len(domain.images), loss)
        result.eval().zero_grad()
        return curve, known.argmax(-1)

    def _accuracies(
        self, result: PromptKDClassifier, student: Clip, teacher: Clip, prompted: Tensor, domain: Domain
    ) -> dict[str, Any]:
        """Accuracies where there are labels, and a warning where the teacher has little to teach."""
        if not (domain.held_out or domain.shots):
            return {"warnings": ["no labels: whether the teacher is better than the student is not known"]}
        scores = {"result": result.predict(_images(domain)).cpu(), "teacher": prompted}
        for name, clip in (("teacher_zero_shot", teacher), ("student_zero_shot", student)):
            if clip.speaks:
                with clip.frozen():
                    vectors = clip.class_vectors(domain.class_names, domain.templates)
                    scores[name] = _scores(clip, vectors, domain)
        found: dict[str, Any] = {"warnings": []}
        if domain.held_out:
            found["accuracy"] = {name: accuracies(each, domain) for name, each in scores.items()}
        # on the shots only the unprompted teacher can be judged: the prompts have seen them
        judged = "teacher" if domain.held_out else "teacher_zero_shot"
        if "student_zero_shot" in scores:
            gap = (_right(scores[judged], domain) - _right(scores["student_zero_shot"], domain)).tolist()
            mean, error = statistics.fmean(gap), statistics.pstdev(gap) / len(gap) ** 0.5
            if mean <= 2 * error:
                text = f"the teacher is not clearly better than the student: {mean:+.1%} (standard error {error:.1%})"
                found["warnings"].append(text)
                warnings.warn(f"{self.name}: {text}", stacklevel=2)
        return found


def prompts_of(teacher: Any) -> tuple[DeepPrompts | None, DeepPrompts | None] | None:
    """The prompts (text, vision) of a bundle from :meth:`PromptKD.prompt_teacher`, ``None`` where it has none."""
    parts = teacher.parts if isinstance(teacher, Bundle) else {}
    return (parts[PARTS[0]], parts[PARTS[1]]) if set(PARTS) <= set(parts) else None


def accuracies(scores: Tensor, domain: Domain) -> dict[str, float]:
    """Accuracies of ``scores [n, C]`` on the held-out images.

    ``all``: among all names. ``base`` and ``novel``: images of base classes among their names, of novel ones among
    theirs, as base-to-new comparisons have it; ``harmonic``: 2bn / (b + n). These only where there are both.
    """
    labels = torch.tensor([label for _, label in domain.held_out])
    found = {"all": float(_right(scores, domain).mean())}
    novel = [label for label in range(len(domain.class_names)) if label not in domain.base]
    shares = []
    for group in (domain.base, novel):
        rows = torch.isin(labels, torch.tensor(group, dtype=labels.dtype))
        guess = torch.tensor(group)[scores[rows][:, group].argmax(-1)] if rows.any() else labels[:0]
        shares.append(float((guess == labels[rows]).float().mean()) if rows.any() else math.nan)
    b, n = shares
    if not math.isnan(b + n):
        found |= {"base": b, "novel": n, "harmonic": 2 * b * n / (b + n) if b + n else 0.0}
    return found


def _images(domain: Domain) -> list[Any]:
    return [image for image, _ in domain.held_out or domain.shots]


def _scores(clip: Clip, vectors: Tensor, domain: Domain) -> Tensor:
    images = _images(domain)
    return logits(clip.scale, clip.encode_all(images), vectors).cpu() if images else torch.zeros(0)


def _right(scores: Tensor, domain: Domain) -> Tensor:
    labels = torch.tensor([label for _, label in domain.held_out or domain.shots])
    return (scores.argmax(-1) == labels).float()
