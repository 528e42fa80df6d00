"""PromptKD against few-shot prompt learning on a small CLIP, from flat pictures to two other domains.

Plan. Two CLIPs are trained from scratch on flat pictures of the still world with captions: a teacher (6 layers, width
256) longer, a student (3 layers, width 128) shorter. The domain shows 20 kinds of thing in another style (textured; as
a second domain cut-outs of photographs). Each seed draws 10 base and 10 novel kinds, 16 labelled shots of each base
kind, 2,000 unlabelled pictures of all kinds and 1,000 held-out ones; base and novel accuracy are each among their own
10 names, as in the paper, and H = 2bn / (b + n). The last epoch counts; nothing is chosen on held-out pictures.

Baselines: the student zero-shot; CoOp and IVLP on the student, cross-entropy on the base shots. PromptKD with the
zero-shot and with the prompted teacher (PromptSRC), on pictures of base kinds alone (inductive, as many pictures), and
with the whole student tower training (upper reference). Figures of the teacher itself stand beside.

Rates are chosen on seed 0: for the few-shot arms and the teacher by base accuracy on 300 validation pictures of base
kinds, for the distillation by agreement with the zero-shot teacher, without labels, after 4 epochs. Augmentation is
off: random crops of 8 % of the area hold nothing to tell, and on validation pictures they cost few-shot learning about
13 points of H. The factor of the divergence is 200, the paper's for small sets of names.

Must be seen: H of PromptKD above few-shot prompt learning's, with the gain largest on novel kinds; the few-shot arm
loses on novel kinds; PromptKD far above the zero-shot student and close to the teacher; no text tower at inference
(parameters, time a picture, contenders in turns in one process).

Smaller than the paper: CLIPs of 5.5 and 0.9 million parameters on pictures of 56 pixels instead of ViT-L/14 and
ViT-B/16, two procedural domains instead of 11 data sets, 6 epochs in batches of 16 (few-shot learning: 12 of 8)
instead of 20 in batches of 8.
"""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
import warnings
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.core.paths import atomic_file
from gossamer.experiments.compression import _promptkd_fixtures as fixtures
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "student_zero_shot": {},
    "teacher_zero_shot": {},
    "teacher_prompted": {},
    "coop": {"few_shot": "coop"},
    "ivlp": {"few_shot": "ivlp"},
    "promptkd_zero_shot_teacher": {"teacher_prompt": "none"},
    "promptkd": {"teacher_prompt": "promptsrc"},
    "promptkd_inductive": {"teacher_prompt": "promptsrc", "inductive": True},
    "promptkd_full": {"teacher_prompt": "promptsrc", "tune": "all"},
    "photo_student_zero_shot": {"style": "photo"},
    "photo_teacher_prompted": {"style": "photo"},
    "photo_ivlp": {"style": "photo", "few_shot": "ivlp"},
    "photo_promptkd": {"style": "photo", "teacher_prompt": "promptsrc"},
    "cost": {},
}
_RATES = (0.0001, 0.0003, 0.001, 0.005, 0.02, 0.05)
_KD: dict[str, Any] = {"weight": 200.0, "batch": 16, "augment": False}
_FEW_SHOT: dict[str, Any] = {"batch": 8, "augment": False}


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Accuracies of one arm at one seed."""
    import torch

    options = dict(ARMS[arm])
    if arm == "cost":
        return _cost(lab)
    style = options.pop("style", "textured")
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check of the teacher is a figure of its own
        data = _data(style, seed, lab)
        if "few_shot" in options:
            return _few_shot("student", options["few_shot"], data, seed, lab, _rate("ivlp", lab))
        if "teacher_prompt" in options:
            return _distil(options, style, data, seed, lab)
        if arm.endswith("teacher_prompted"):
            return _accuracies(_prompted(style, seed, lab), data)
        return _accuracies(fixtures.pretrained(arm.removeprefix("photo_").split("_")[0], lab), data)


def conclude(results: Results) -> Conclusion:
    """Shown: in the textured domain PromptKD's H is above the better few-shot arm's, beyond doubt."""
    few = max(("coop", "ivlp"), key=lambda arm: results.mean(arm, "harmonic"))
    effect, low, high = results.paired("promptkd", few, "harmonic")
    gains = {kind: results.paired("promptkd", few, kind)[0] for kind in ("base", "novel")}
    drop = results.paired(few, "student_zero_shot", "novel")
    margin = results.paired("promptkd", "student_zero_shot", "harmonic")
    behind = results.paired("promptkd", "teacher_prompted", "harmonic")
    ahead = results.paired("teacher_prompted", "student_zero_shot", "harmonic")
    photo = results.paired("photo_promptkd", "photo_ivlp", "harmonic")
    prompted = results.paired("promptkd", "promptkd_zero_shot_teacher", "harmonic")
    unseen = results.paired("promptkd", "promptkd_inductive", "novel")
    cost = next(iter(results["cost"].values()))
    lines = (
        MustSee(f"H of PromptKD above few-shot prompt learning's ({few})", _interval(effect, low, high), low > 0),
        MustSee(
            "the gain over few-shot learning is largest on novel kinds",
            f"novel {gains['novel']:+.1%}, base {gains['base']:+.1%}",
            gains["novel"] > gains["base"],
        ),
        MustSee("few-shot learning loses on novel kinds against zero-shot", _interval(*drop), drop[0] < 0),
        MustSee("H 5 points or more above the zero-shot student's", _interval(*margin), margin[0] > 0.05),
        MustSee("the student comes within 5 points of H of its teacher", _interval(*behind), behind[0] > -0.05),
        MustSee("the teacher is clearly better than the student to begin with", _interval(*ahead), ahead[1] > 0),
        MustSee("the same in the photographic domain: above few-shot IVLP", _interval(*photo), photo[1] > 0),
        MustSee("a prompted teacher teaches more than a zero-shot one", _interval(*prompted), prompted[0] > 0),
        MustSee("pictures of novel kinds, unlabelled, help on novel kinds", _interval(*unseen), unseen[0] > 0),
        MustSee(
            "no text tower at inference: fewer parameters and less time than the student's own two towers",
            f"{cost['parameters']:,.0f} of {cost['parameters_student']:,.0f} parameters (teacher "
            f"{cost['parameters_teacher']:,.0f}); {cost['ms']:.2f} ms a picture against {cost['ms_two_towers']:.2f} "
            f"with both towers, {cost['ms_image_tower']:.2f} its image tower, {cost['ms_teacher']:.2f} the teacher's",
            cost["parameters"] < cost["parameters_student"] and cost["ms"] < cost["ms_two_towers"],
        ),
    )
    return Conclusion(
        shown=lines[0].shown and lines[1].shown,
        baseline=f"{few} on the student: H {results.mean(few, 'harmonic'):.1%}",
        result=f"PromptKD: H {results.mean('promptkd', 'harmonic'):.1%}",
        effect=effect,
        low=low,
        high=high,
        unit="harmonic mean of base and novel accuracy",
        must_see=lines,
        notes=(
            "base / novel / H: "
            + "; ".join(
                f"{arm} " + " / ".join(f"{results.mean(arm, kind):.1%}" for kind in ("base", "novel", "harmonic"))
                for arm in ARMS
                if arm != "cost"
            ),
        ),
    )


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]"


def _data(style: str, seed: int, lab: Lab, *, purpose: int = 0) -> dict[str, Any]:
    """A domain for the seed; ``purpose`` 1 gives other pictures of the same classes, for choosing rates."""
    names = list(fixtures.CLASSES)
    random.Random(seed).shuffle(names)
    base, start = tuple(names[:10]), 1_000_000 * (purpose + 1) + 10_000 * seed
    many, shots, held = (40, 2, 40) if lab.quick else ((600, 16, 600) if purpose else (2000, 16, 1000))
    images = fixtures.domain_scenes(many, start)
    taught = fixtures.domain_scenes(10 * shots, start + 1, base)
    judged = fixtures.domain_scenes(held, start + 2)
    return {
        "images": fixtures.pictures(images, style),
        "class_names": fixtures.CLASSES,
        "shots": _labelled(taught, style),
        "held_out": _labelled(judged, style),
        "templates": fixtures.TEMPLATES,
        "processor": fixtures.processor(),
    }


def _labelled(scenes: list[Any], style: str) -> list[tuple[Any, str]]:
    kinds = [scene.things[0].kind for scene in scenes]
    return list(zip(fixtures.pictures(scenes, style), kinds, strict=True))


def _epochs(lab: Lab, count: int) -> int:
    return 2 if lab.quick else count


def _distil(options: dict[str, Any], style: str, data: dict[str, Any], seed: int, lab: Lab) -> dict[str, float]:
    from gossamer.pipeline.single import system

    if options.pop("inductive", False):
        base = tuple(sorted({name for _, name in data["shots"]}))
        scenes = fixtures.domain_scenes(len(data["images"]), 7_000_000 + seed, base)
        data = {**data, "images": fixtures.pictures(scenes, style)}
    teacher = fixtures.pretrained("teacher", lab)
    if options["teacher_prompt"] != "none":
        teacher = _prompted(style, seed, lab)
    rate = _rate("full" if options.get("tune") == "all" else "distil", lab)
    options |= {**_KD, "epochs": _epochs(lab, 6), "lr": rate}
    student = fixtures.pretrained("student", lab).model
    made = system("promptkd", seed=seed, companions={"teacher": teacher}, **options).compress(student, data)
    values = made.report.values
    return {**values["accuracy"]["result"], "agreement": values["agreement_with_teacher"]}


def _prompted(style: str, seed: int, lab: Lab) -> Bundle:
    """The teacher with prompts learnt from the shots, which are kept for the arms that share them."""
    from safetensors.torch import load_file, save_file

    from gossamer.compression.promptkd import PARTS
    from gossamer.parts.prompt_hooks import DeepPrompts

    teacher = fixtures.pretrained("teacher", lab)
    path = lab.folder("prompts") / f"{style}-{seed}.safetensors"
    if not path.exists():
        data = _data(style, seed, lab)
        learnt = _learn("teacher", "promptsrc", data, seed, lab, _rate("promptsrc", lab), _epochs(lab, 12))
        with atomic_file(path) as temporary:
            tensors = {name: prompts.vectors.detach() for name, prompts in zip(PARTS, learnt, strict=True)}
            save_file(tensors, str(temporary))
    parts = {}
    for name, vectors in load_file(path).items():
        depth, tokens, width = vectors.shape
        parts[name] = DeepPrompts(width, tokens=tokens, depth=depth)
        parts[name].vectors.data.copy_(vectors)
        parts[name].requires_grad_(False)
    return Bundle(teacher.model, teacher.processor, parts=parts)


def _learn(name: str, method: str, data: dict[str, Any], seed: int, lab: Lab, rate: float, epochs: int) -> Any:
    from gossamer.compression.promptkd.clip import Clip, Training, learn_prompts
    from gossamer.compression.promptkd.domain import Domain

    training = Training(epochs=epochs, lr=rate, seed=seed, **_FEW_SHOT)
    clip, domain = Clip(fixtures.pretrained(name, lab)), Domain.read(data, "promptkd")
    return learn_prompts(clip, domain, method, tokens=4, depth=9, training=training)


def _few_shot(name: str, method: str, data: dict[str, Any], seed: int, lab: Lab, rate: float) -> dict[str, float]:
    """Prompts of the student learnt by cross-entropy on the shots."""
    from gossamer.compression.promptkd import PARTS

    learnt = _learn(name, method, data, seed, lab, rate, _epochs(lab, 12))
    own = fixtures.pretrained(name, lab)
    return _accuracies(Bundle(own.model, own.processor, parts=dict(zip(PARTS, learnt, strict=True))), data)


def _accuracies(bundle: Bundle, data: dict[str, Any]) -> dict[str, float]:
    """Of a CLIP with or without prompts in its parts, over all names."""
    import torch

    from gossamer.compression.promptkd import accuracies, prompts_of
    from gossamer.compression.promptkd.clip import Clip, logits
    from gossamer.compression.promptkd.domain import Domain

    clip, domain = Clip(bundle), Domain.read(data, "promptkd")
    text, vision = prompts_of(bundle) or (None, None)
    with torch.no_grad(), clip.frozen(), clip.prompted(text, vision):
        vectors = clip.class_vectors(domain.class_names, domain.templates)
        found = logits(clip.scale, clip.encode_all([image for image, _ in domain.held_out]), vectors)
    return accuracies(found, domain)


def _rate(what: str, lab: Lab) -> float:
    """Chosen on other pictures of seed 0; the same in both styles."""
    rate: float = lab.once(f"rate-{what}", functools.partial(_choose, what, lab))
    return rate


def _choose(what: str, lab: Lab) -> float:
    from gossamer.pipeline.single import system

    data, student = _data("textured", 0, lab, purpose=1), fixtures.pretrained("student", lab).model

    def score(rate: float) -> float:
        if what in ("ivlp", "promptsrc"):
            name = "student" if what == "ivlp" else "teacher"
            bundle = fixtures.pretrained(name, lab)
            learnt = dict(zip(("text_prompts", "vision_prompts"),
                              _learn(name, what, data, 0, lab, rate, _epochs(lab, 10)), strict=True))  # fmt: skip
            return _accuracies(Bundle(bundle.model, bundle.processor, parts=learnt), data)["base"]
        teacher = {"teacher": fixtures.pretrained("teacher", lab)}
        tune = "all" if what == "full" else "prompts"
        made = system("promptkd", companions=teacher, teacher_prompt="none", tune=tune, lr=rate,
                      epochs=_epochs(lab, 4), **_KD).compress(student, data)  # fmt: skip
        agreement: float = made.report.values["agreement_with_teacher"]
        return agreement

    scores = {}
    for rate in _RATES:
        with contextlib.suppress(InputError):  # a rate too high for the loss to stay finite
            scores[rate] = score(rate)
    lab.log(f"rates for {what}: " + ", ".join(f"{rate:g} {score:.1%}" for rate, score in scores.items()))
    return max(scores, key=lambda rate: scores[rate])


def _cost(lab: Lab) -> dict[str, float]:
    """Parameters, and milliseconds a picture at batch 1, contenders in turns."""
    import torch

    from gossamer.pipeline.single import system

    teacher, student = (fixtures.pretrained(name, lab) for name in ("teacher", "student"))
    data = {**_data("textured", 0, lab), "held_out": ()}
    data |= {"images": data["images"][:16]}
    made = system("promptkd", companions={"teacher": teacher}, teacher_prompt="none", epochs=1, **_KD).compress(
        student.model, data
    )
    classifier = made.model.eval()
    ids = _ids(student)
    pixels = torch.randn(1, 3, fixtures.SIDE, fixtures.SIDE)
    contenders = {
        "ms": lambda: classifier(pixels),
        "ms_two_towers": lambda: student.model(input_ids=ids, pixel_values=pixels),
        "ms_image_tower": lambda: student.model.get_image_features(pixel_values=pixels),
        "ms_teacher": lambda: teacher.model.get_image_features(pixel_values=pixels),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for _ in range(3 if lab.quick else 60):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    counts = {"parameters": classifier, "parameters_student": student.model, "parameters_teacher": teacher.model}
    return {name: statistics.median(values) for name, values in times.items()} | {
        name: float(sum(parameter.numel() for parameter in model.parameters())) for name, model in counts.items()
    }


def _ids(bundle: Bundle) -> Any:
    from gossamer.compression.promptkd.clip import Clip

    return Clip(bundle).ids(fixtures.CLASSES, fixtures.TEMPLATES[0])
