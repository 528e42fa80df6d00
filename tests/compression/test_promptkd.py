"""PromptKD: losses against formulas written out, each trap, refusals, and a classifier that stands alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

import gossamer  # noqa: F401
from gossamer.compression.promptkd import PARTS, PromptKD, accuracies
from gossamer.compression.promptkd.clip import Clip, Training, divergence, gaussian_weights, logits, self_regulation
from gossamer.compression.promptkd.domain import Crop, Domain, batches, draw_crop
from gossamer.compression.promptkd.student import PromptKDClassifier
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, UsageError
from gossamer.testing import check_system
from gossamer.testing.bench import Bench

BENCH = Bench("clip")
QUICK: dict[str, Any] = {"epochs": 2, "batch": 4, "augment": False}


def teacher(seed: int = 10) -> Bundle:
    return copy.deepcopy(BENCH._companion(seed))


def distil(data: dict[str, Any] | None = None, *, given: Any = None, student: Any = None, **options: Any) -> Any:
    system = PromptKD(companions={"teacher": given or teacher()}, **{**QUICK, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return system.compress(student or BENCH.model(), data or BENCH.domain())


def naive_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """sum over images and classes of p log(p / q), by loops, divided by B * C; teacher first."""
    total = torch.zeros(())
    for row_t, row_s in zip(teacher, student, strict=True):
        p, q = row_t.exp() / row_t.exp().sum(), row_s.exp() / row_s.exp().sum()
        for k in range(len(p)):
            total = total + p[k] * (p[k].log() - q[k].log())
    return total / teacher.numel()


def test_the_divergence_is_teacher_first_and_divided_by_images_and_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    given, guess = (torch.randn(3, 5, generator=generator).requires_grad_() for _ in range(2))
    ours, naive = divergence(given.detach(), guess), naive_divergence(given.detach(), guess)
    torch.testing.assert_close(ours, naive)
    for found, expected in zip(
        torch.autograd.grad(ours, guess), torch.autograd.grad(naive, guess, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert float(divergence(guess, given).detach()) != pytest.approx(float(ours.detach()))
    batchmean = torch.nn.functional.kl_div(guess.log_softmax(-1), given.softmax(-1), reduction="batchmean")
    assert float(batchmean) == pytest.approx(5 * float(ours), rel=1e-5)
    assert float(divergence(2 * given, 2 * guess, tau=2.0)) == pytest.approx(float(ours), rel=1e-5)


def test_self_regulation_is_the_sum_of_its_three_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    text, image, text0, image0 = (
        torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (3, 4, 3, 4)
    )
    text.requires_grad_()
    image.requires_grad_()
    ours = self_regulation(logits(9.0, image, text), text, image, text0, image0, 9.0)
    naive = 25 * (text - text0).abs().sum() / 18 + 10 * (image - image0).abs().sum() / 24
    naive = naive + naive_divergence(9.0 * image0 @ text0.T, 9.0 * image @ text.T)
    torch.testing.assert_close(ours, naive)
    for found, expected in zip(
        torch.autograd.grad(ours, (text, image)), torch.autograd.grad(naive, (text, image)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gaussian_weights_are_those_of_mean_15_and_deviation_1_of_20_epochs() -> None:
    raw = [math.exp(-((epoch - 15) ** 2) / 2) for epoch in range(1, 21)]
    assert gaussian_weights(20) == pytest.approx([value / sum(raw) for value in raw])
    assert gaussian_weights(1) == [1.0]


def test_the_rate_has_one_warm_epoch_and_then_a_cosine() -> None:
    rates = [Training(epochs=20, lr=0.005).rate(epoch) for epoch in range(20)]
    assert rates[:2] == [1e-5, 0.005]
    assert rates[11] == pytest.approx(0.0025)
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert Training(epochs=1, lr=0.005).rate(0) == 0.005


def distillation_loss(result: Any, data: dict[str, Any], given: Bundle, weight: float, tau: float) -> Tensor:
    """Stage C written out from plain CLIP calls, for a zero-shot teacher and one step of all images."""
    tokenizer, images = given.processor.tokenizer, given.processor.image_processor
    clip = given.model.eval()
    pixels = images(images=data["images"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = clip.get_image_features(pixel_values=pixels).pooler_output
        vectors = []
        for name in data["class_names"]:
            each = []
            for template in data["templates"]:
                ids = tokenizer(template.format(name), add_special_tokens=False)["input_ids"]
                row = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
                feature = clip.get_text_features(input_ids=row).pooler_output[0]
                each.append(feature / feature.norm())
            mean = torch.stack(each).mean(0)
            vectors.append(mean / mean.norm())
        w = torch.stack(vectors)
        known = clip.logit_scale.exp() * seen / seen.norm(dim=-1, keepdim=True) @ w.T
    z = result.projector(result.tower(pixel_values=pixels).image_embeds)
    guess = BENCH.model().logit_scale.exp().detach() * z / z.norm(dim=-1, keepdim=True) @ w.T
    return weight * tau**2 * naive_divergence(known / tau, guess / tau)


def test_first_loss_and_first_step_are_those_of_the_formula() -> None:
    data, given = BENCH.domain(), teacher()
    options = {"teacher_prompt": "none", "epochs": 1, "batch": 12, "tau": 2.0, "weight": 300.0, "given": given}
    start = distil(data, lr=1e-12, **options)
    result = start.model.train()
    expected = distillation_loss(result, data, given, 300.0, 2.0)
    assert start.report.values["losses"][0] == pytest.approx(float(expected.detach()), rel=1e-4)
    gradients = torch.autograd.grad(expected, [result.prompts.vectors, *result.projector.parameters()])
    lr = 1e-3
    moved = distil(data, lr=lr, **options).model
    for before, after, gradient in zip(
        [result.prompts.vectors, *result.projector.parameters()],
        [moved.prompts.vectors, *moved.projector.parameters()],
        gradients,
        strict=True,
    ):
        torch.testing.assert_close((before - after) / lr, gradient + 5e-4 * before, atol=2e-3, rtol=1e-2)
    frozen = zip(result.tower.parameters(), moved.tower.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in frozen)


def test_class_vectors_are_the_teachers_and_the_projector_is_as_wide() -> None:
    given = teacher()
    result = distil(given=given, teacher_prompt="none").model
    clip = Clip(given)
    with clip.frozen():
        expected = clip.class_vectors(BENCH.domain()["class_names"], BENCH.domain()["templates"])
    assert torch.equal(result.class_vectors, expected)
    assert result.class_vectors.shape[1] == given.model.config.projection_dim == 96
    assert result.config.scale == pytest.approx(float(BENCH.model().logit_scale.exp()))


@pytest.mark.parametrize("method", ["coop", "ivlp", "promptsrc"])
def test_the_teacher_learns_prompts_and_stays_as_it_was(method: str) -> None:
    given = teacher()
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    system = PromptKD(companions={"teacher": given}, teacher_prompt=method, **QUICK)
    prompted = system.prompt_teacher(BENCH.domain())
    text, vision = (prompted.parts[name] for name in PARTS)
    assert text.vectors.shape == ((1, 4, 96) if method == "coop" else (3, 4, 96))
    assert vision is None if method == "coop" else vision.vectors.shape == (3, 4, 96)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in given.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in given.model.modules())
    one, again = (distil(given=bundle, teacher_prompt=method).model for bundle in (given, prompted))
    assert torch.equal(one.class_vectors, again.class_vectors)
    assert torch.equal(one.text_prompts, text.vectors)


def test_prompts_begin_as_the_words_of_the_template() -> None:
    given = teacher()
    system = PromptKD(companions={"teacher": given}, teacher_prompt="coop", tokens=6, lr=1e-12, **QUICK)
    text = system.prompt_teacher(BENCH.domain()).parts[PARTS[0]]
    words = given.processor.tokenizer("a big", add_special_tokens=False)["input_ids"]
    embedded = given.model.text_model.get_input_embeddings().weight[words]
    assert len(words) < 6
    torch.testing.assert_close(text.vectors[0, -len(words) :], embedded)
    assert text.vectors[0, : -len(words)].std() < 0.1


def test_the_slots_of_the_prompts_hold_no_letter_of_the_name() -> None:
    clip = Clip(teacher())
    ids = clip.ids(["dog", "red roof"], "a big {}", slots=6)
    rows = clip.tokenizer(["a big dog", "a big red roof"], add_special_tokens=False)["input_ids"]
    words = clip.tokenizer("a big", add_special_tokens=False)["input_ids"]
    for found, row in zip(ids.tolist(), rows, strict=True):
        assert found[7 : found.index(clip.tokenizer.eos_token_id)] == row[len(words) :]


def test_a_rest_of_one_image_is_no_batch() -> None:
    sizes = [len(rows) for rows in batches(9, 8, torch.Generator().manual_seed(0))]
    assert sizes == [8]
    data = BENCH.domain()
    assert distil({**data, "images": data["images"][:9]}, batch=8).model is not None


def test_without_augmentation_the_teacher_sees_each_image_once() -> None:
    given, seen = teacher(), []
    given.model.vision_model.register_forward_hook(lambda module, inputs, out: seen.append(len(out.last_hidden_state)))
    data = {**BENCH.domain(), "held_out": [], "shots": []}
    distil(data, given=given, teacher_prompt="none", epochs=5)
    assert sum(seen) == len(data["images"])


def test_teacher_and_student_see_the_same_part_in_their_own_sizes() -> None:
    image = Image.fromarray(np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], 30, 0).repeat(3, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        crop = draw_crop(image, generator)
        assert 0 <= crop.left < crop.right <= 1
        assert 0 <= crop.top < crop.bottom <= 1
        large, small = (np.asarray(crop.of(image, size)).astype(float) for size in (64, 16))
        assert large.mean() == pytest.approx(small.mean(), abs=3)
        assert (large[:, 0].mean() > large[:, -1].mean()) == crop.mirrored
    assert Crop().whole


def test_full_precision_survives_autocast_in_the_logits() -> None:
    seen, vectors = (torch.nn.functional.normalize(torch.randn(4, 32), dim=-1) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(100.0, seen, vectors)
    assert torch.equal(found, logits(100.0, seen, vectors))


def test_weights_move_under_a_callers_autocast() -> None:
    """Autocast keeps half-precision copies of weights that require gradients until it ends."""
    generator = torch.Generator().manual_seed(0)
    x, layer = torch.randn(8, 4, generator=generator), torch.nn.Linear(4, 1)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    training = Training(epochs=60, batch=4, lr=0.05, augment=False)
    with torch.autocast("cpu", torch.bfloat16):
        curve = training.run(
            list(layer.parameters()), 8, lambda rows, _: (layer(x[rows]).float() - y[rows]).square().mean()
        )
    assert curve[-1] < 0.01 * curve[0]


def test_it_learns_what_the_teacher_says() -> None:
    data = BENCH.domain()
    done = distil(data, teacher_prompt="none", epochs=60, lr=0.001)
    losses = done.report.values["losses"]
    assert losses[-1] < 0.2 * losses[0]
    assert done.report.values["agreement_with_teacher"] >= 0.9
    assert "accuracy" in done.report.values


def test_the_report_counts_parameters_and_accuracies() -> None:
    student = BENCH.model()
    values = distil(student=student).report.values
    assert values["parameters_before"] == sum(p.numel() for p in student.parameters())
    assert values["trained_parameters"] == 2 * 4 * 64 + 64 * 96 + 96 + 2 * 96 + 96 * 96 + 96
    assert set(values["accuracy"]) == {"result", "student_zero_shot", "teacher_zero_shot", "teacher"}
    domain = Domain.read(BENCH.domain(), "test")
    # classes 0 ... 3 in turn, of which 0 and 1 have shots
    scores = torch.eye(4)[torch.tensor([0, 1, 2, 1, 2, 1, 2, 3])] + torch.tensor([0.3, 0.2, 0.1, 0.0])
    # the image of place 3 goes to class 1, among novel names to 2; that of place 4 to 2, among base names to 0
    assert accuracies(scores, domain) == {"all": 6 / 8, "base": 1.0, "novel": 3 / 4, "harmonic": 6 / 7}
    one_sided = dataclasses.replace(domain, shots=())
    assert accuracies(scores, one_sided) == {"all": 6 / 8}


def test_a_teacher_that_is_no_better_is_warned_of() -> None:
    data, student = BENCH.domain(), BENCH.model()
    system = PromptKD(companions={"teacher": Bundle(student, BENCH.processor())}, teacher_prompt="none", **QUICK)
    with pytest.warns(UserWarning, match="not clearly better than the student"):
        report = system.compress(student, data).report
    assert report.values["warnings"]
    silent = {**data, "shots": [], "held_out": []}
    assert "not known" in system.compress(student, silent).report.values["warnings"][0]


@pytest.mark.parametrize("method", ["none", "promptsrc"])
def test_classes_are_added_with_the_same_teacher_only(method: str, tmp_path: Path) -> None:
    given, data = teacher(), BENCH.domain()
    result = distil(given=given, teacher_prompt=method).model.eval()
    pixels = BENCH.inputs()["pixel_values"]
    before = result(pixels).logits
    vectors = result.class_vectors.clone()
    with pytest.raises(InputError, match="must be the one that made the class vectors"):
        result.add_classes(["fox"], teacher(seed=11))
    with pytest.raises(InputError, match="must get new names"):
        result.add_classes(["dog"], given)
    result.add_classes(["fox", "lazy dog"], given)
    assert torch.equal(result(pixels).logits[:, :4], before)
    assert result.config.id2label[5] == "lazy dog"
    whole = [*data["class_names"], "fox", "lazy dog"]
    together = distil({**data, "class_names": whole}, given=given, teacher_prompt=method).model.class_vectors
    torch.testing.assert_close(result.class_vectors, together)
    assert torch.equal(result.class_vectors[:4], vectors)
    result.save_pretrained(str(tmp_path))
    again = type(result).from_pretrained(str(tmp_path)).eval()
    assert torch.equal(again(pixels).logits, result(pixels).logits)


def test_it_loads_in_a_fresh_process_and_predicts_the_same(tmp_path: Path) -> None:
    result = distil().model
    image = np.asarray(BENCH.domain()["images"][0])
    np.save(tmp_path / "image.npy", image)
    result.save_pretrained(str(tmp_path / "model"))
    code = (
        "import sys, numpy, gossamer\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1] + '/model')\n"
        "print(*model.predict([numpy.load(sys.argv[1] + '/image.npy')])[0].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert [float(x) for x in done.stdout.split()] == pytest.approx(result.predict([image])[0].tolist(), abs=1e-6)


def test_a_copy_has_prompts_of_its_own_and_gradients_reach_them() -> None:
    result = distil().model
    other = copy.deepcopy(result)
    pixels = BENCH.inputs()["pixel_values"]
    before = result.eval()(pixels).logits.detach()
    with torch.no_grad():
        other.prompts.vectors.add_(1.0)
    assert torch.equal(result(pixels).logits, before)
    assert not torch.equal(other.eval()(pixels).logits, before)
    out = result(pixels, labels=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert result.prompts.vectors.grad.flatten(1).norm(dim=1).gt(0).all()


def test_a_vision_tower_alone_and_half_precision_are_students_too() -> None:
    student = BENCH.model()
    tower = CLIPVisionModelWithProjection(student.config.vision_config).eval()
    tower.vision_model.load_state_dict(student.vision_model.state_dict())
    tower.visual_projection.load_state_dict(student.visual_projection.state_dict())
    one, other = (distil(student=model).model for model in (student, tower))
    assert torch.equal(one.projector[0].weight, other.projector[0].weight)
    half = distil(student=BENCH.model().to(torch.bfloat16)).model
    assert half.dtype == torch.bfloat16
    assert half.predict(BENCH.domain()["images"]).isfinite().all()


def test_all_of_the_tower_trains_where_it_is_asked_for() -> None:
    before = BENCH.model().vision_model.state_dict()
    tower = distil(tune="all").model.tower.vision_model
    moved = [name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("q_proj" in name for name in moved)
    assert any("patch_embedding" in name for name in moved)


def test_a_folder_of_images_and_files_that_are_none(tmp_path: Path) -> None:
    data = BENCH.domain()
    for number, image in enumerate(data["images"]):
        image.save(tmp_path / f"{number:02}.png")
    folder, listed = (distil({**data, "images": images}).model for images in (str(tmp_path), data["images"]))
    assert torch.equal(folder.prompts.vectors, listed.prompts.vectors)
    (tmp_path / "99.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"99\.png: must be a readable image"):
        distil({**data, "images": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "must be a list of names"),
        ({"class_names": ["dog", " "]}, "must be a list of names"),
        ({"class_names": ["dog", "bird", "dog"]}, "must name each class once"),
        ({"class_names": ["dog", "bird", "red roof", "grey dog", "dog " * 40]}, "must fit 32 tokens"),
        ({"images": []}, "must be at least 2"),
        ({"images": "/no/such/folder"}, "must be images or a folder"),
        ({"images": [np.zeros((4, 4)), np.zeros((4, 4))]}, "must be uint8"),
        ({"shots": [(None, "fox")]}, "must have labels among class_names"),
        ({"shots": []}, "must have labelled shots"),
        ({"templates": ["a photo"]}, "must hold one {}"),
        ({"class_name": ["dog"]}, "must have only"),
    ],
)
def test_a_domain_that_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distil({**BENCH.domain(), **change})


def test_models_that_cannot_be_used_are_refused() -> None:
    data = BENCH.domain()
    with pytest.raises(InputError, match="student: must be a CLIPModel"):
        distil(data, student=Bench("vit").model())
    with pytest.raises(InputError, match="teacher: must be a CLIPModel"):
        distil(data, given=Bundle(Bench("bert").model(), BENCH.processor()))
    with pytest.raises(InputError, match="must come with its tokenizer"):
        distil({**data, "processor": None}, given=teacher().model)
    with pytest.raises(InputError, match="must be a mapping"):
        distil(data["images"])
    with pytest.raises(InputError, match="must keep the loss finite"):
        distil(data, lr=1e30)


def test_names_that_the_teacher_cannot_tell_apart_are_refused() -> None:
    given = teacher()
    for weight in given.model.text_model.embeddings.parameters():
        weight.data[:] = weight.data[0].clone()
    with pytest.raises(InputError, match="must be told apart by its tokenizer"):
        distil(given=given, teacher_prompt="none")


def test_a_tower_that_pools_elsewhere_than_at_the_end_token_is_refused() -> None:
    """The old id 2 in a config means the highest id; names would not be read where another word is higher."""
    given = teacher()
    given.processor.tokenizer.eos_token = "</s>"
    with pytest.raises(InputError, match="must pool at the end token"):
        distil(given=given)
    legacy = teacher()
    legacy.model.text_model.config.eos_token_id = 2
    assert distil(given=legacy).model is not None


@pytest.mark.parametrize("law", ["check_the_student_stands_alone", "check_one_image_is_judged_as_in_a_batch"])
def test_the_laws_of_distillation_bite(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if law == "check_the_student_stands_alone":
        start = PromptKD._start

        def sharing(system: Any, student: Any, *rest: Any) -> Any:
            result = start(system, student, *rest)
            result.tower.visual_projection.weight = student.model.visual_projection.weight
            return result

        monkeypatch.setattr(PromptKD, "_start", sharing)
    else:
        monkeypatch.setattr(PromptKDClassifier, "eval", lambda model: model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = check_system("promptkd", only=[law])
    assert [finding.law for finding in findings] == [law], findings
