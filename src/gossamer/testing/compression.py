"""Laws of compression: the report counts the bytes that are held, the saved folder loads bit for bit, it is smaller."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.kinds.compression import CompressionReport, held_bytes
from gossamer.testing.bench import Bench, output
from gossamer.testing.comparison import differs, frozen
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("data",)
# of those that distil or search; what is measured on the machine would not be the same twice
QUICK = {"epochs": 2, "batch": 4, "search_starts": 3, "search_steps": 8, "metric": "params"}
GROUPS = (0, 128, 64, 32, 16)  # of the naive baseline


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    """A model and what the system learns from: token batches, or a domain of pictures where it distils."""
    if _distils(system):
        return {"model": bench.model(), "data": bench.domain()}
    return {"model": bench.model(), "data": [bench.inputs(), bench.inputs(rows=2)]}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    done = system.compress(subject["model"], subject["data"])
    return {"output": _predicted(done.model, subject["data"]), "bytes": done.report.bytes_after}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    from peft import LoraConfig, get_peft_model

    given = subject(system, bench)
    if "pruned" not in sys.modules[type(system).__module__].CARD.provides:  # what was cut can be cut further
        done = system.compress(given["model"], given["data"]).model
        yield "a model that is compressed already", lambda: system.compress(done, given["data"])
    adapted = get_peft_model(bench.model(), LoraConfig(r=2, target_modules="all-linear"))
    yield "a model with an adapter", lambda: system.compress(adapted, given["data"])
    broken = bench.model()
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = math.nan
    yield "a model with a weight that is no number", lambda: system.compress(broken, given["data"])
    if _distils(system):
        names = given["data"]["class_names"]
        for what, change in (
            ("no class names", {"class_names": []}),
            ("a class that is named twice", {"class_names": [*names, names[0]]}),
            ("no pictures", {"images": []}),
            ("a label that is no class", {"shots": [(given["data"]["images"][0], "no such class")]}),
        ):
            yield what, functools.partial(system.compress, bench.model(), {**given["data"], **change})
        alone = type(system)(system.config)
        yield "no teacher", lambda: alone.compress(bench.model(), given["data"])


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    given = subject(system, bench)
    done = system.compress(given["model"], given["data"]).model
    done.save_pretrained(str(folder))
    auto: Any = AutoModelForImageClassification if _distils(system) else AutoModelForCausalLM
    again = auto.from_pretrained(str(folder))
    found = [{"output": _predicted(model, given["data"]), "bytes": held_bytes(model)} for model in (done, again)]
    return found[0], found[1]


@law()
def check_the_report_counts_held_bytes(entry: Entry, bench: Bench) -> None:
    """``bytes_before`` and ``bytes_after`` are those of parameters and buffers, counted here again."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    before = held_bytes(given["model"])
    done = system.compress(given["model"], given["data"])
    found = (done.report.bytes_before, done.report.bytes_after)
    held = (before, held_bytes(done.model))
    assert found == held, f"the report says {found[0]} and {found[1]} bytes, the model holds {held[0]} and {held[1]}"


@law()
def check_it_is_smaller(entry: Entry, bench: Bench) -> None:
    """Fewer bytes are held than before; where it leaves zeros in dense matrices, fewer weights that are not zero."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    held = _nonzero if "sparse" in entry.card.traits else held_bytes
    before = held(given["model"])
    after = held(system.compress(given["model"], given["data"]).model)
    assert after < before, f"{before} {'weights' if held is _nonzero else 'bytes'} became {after}"


@law(trait="distils")
def check_the_student_stands_alone(entry: Entry, bench: Bench) -> None:
    """The result is smaller than teacher and student, has no text tower and shares no weight; both are as before."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    teacher = system.companion(system.config.teacher).model
    before = frozen({"student": given["model"], "teacher": teacher})
    result = system.compress(given["model"], given["data"]).model
    difference = differs(before, frozen({"student": given["model"], "teacher": teacher}))
    assert not difference, f"a model that was given is changed: {difference}"
    for name, model in (("teacher", teacher), ("student", given["model"])):
        assert held_bytes(result) < held_bytes(model), f"it holds more bytes than the {name}"
    towers = [name for name, module in result.named_modules() if "Text" in type(module).__name__]
    assert not towers, f"it has a text tower: {towers}"
    theirs = {tensor.data_ptr() for model in (teacher, given["model"]) for tensor in model.state_dict().values()}
    shared = [name for name, tensor in result.state_dict().items() if tensor.data_ptr() in theirs]
    assert not shared, f"it shares {shared} with a model that was given"


@law(trait="distils")
def check_one_image_is_judged_as_in_a_batch(entry: Entry, bench: Bench) -> None:
    """Probabilities sum to 1 and do not depend on the other images, in whatever mode the model is."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    model, images = system.compress(given["model"], given["data"]).model.train(), given["data"]["images"]
    together, alone = model.predict(images), torch.cat([model.predict([image]) for image in images])
    assert together.shape == (len(images), len(given["data"]["class_names"])), f"it gives {list(together.shape)}"
    difference = differs(together, alone, atol=1e-5)
    assert not difference, f"an image alone and in a batch: {difference}"
    assert torch.allclose(together.sum(-1), torch.ones(len(images))), "probabilities do not sum to 1"


@law(trait="budgeted")
def check_its_error_is_at_most_roundings(entry: Entry, bench: Bench) -> None:
    """At equal bits, the weights' error is at most that of rounding with one group size that costs no more.

    The weights have outliers in a few places, as real ones do.
    """
    system = build(entry, bench, base_options(entry, bench))
    bits = getattr(system.config, "bits", None)
    assert bits is not None, "a budgeted system has an option `bits`"
    mine = system.compress(_with_outliers(bench), bench.inputs()).report
    rounding = registry.find("rounding", kind="compression").load()
    rivals = [rounding(bits=bits, group=group).compress(_with_outliers(bench)).report for group in GROUPS]
    affordable = [report for report in rivals if _size(report) <= _size(mine) * (1 + 1e-6)]
    assert affordable, f"it costs {_size(mine):.3f} bits a weight, less than any rounding at {bits} bits"
    least = min(map(_error, affordable))
    assert _error(mine) <= least * (1 + 1e-6), (
        f"error {_error(mine):.5f} at {_size(mine):.3f} bits a weight, where rounding has {least:.5f}"
    )


def _with_outliers(bench: Bench) -> Any:
    model = bench.model()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for module in list(model.modules())[::2]:
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                places = torch.randint(module.weight.numel(), (24,), generator=generator)
                module.weight.view(-1)[places] *= 12.0
    return model


def _size(report: CompressionReport) -> float:
    weights = [math.prod(row.shape) for row in report.rows]
    return sum(n * row.bits_per_weight for n, row in zip(weights, report.rows, strict=True)) / sum(weights)


def _error(report: CompressionReport) -> float:
    """Root mean square of the matrices' relative errors, by their number of weights."""
    weights = [math.prod(row.shape) for row in report.rows]
    total = sum(n * row.error**2 for n, row in zip(weights, report.rows, strict=True))
    return math.sqrt(total / sum(weights))


def _nonzero(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def _distils(system: Any) -> bool:
    return "distils" in sys.modules[type(system).__module__].CARD.traits


@torch.no_grad()
def _predicted(model: Any, data: Any) -> Tensor:
    """Logits of the first token batch, or probabilities of the domain's pictures."""
    return model.eval().predict(data["images"]) if isinstance(data, dict) else output(model.eval(), data[0])
