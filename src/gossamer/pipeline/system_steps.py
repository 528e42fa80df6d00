"""What a recipe step does when it names a system: the verb of its kind, on the bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError
from gossamer.core.kinds import KINDS
from gossamer.core.recipe import StepCall
from gossamer.parts.roundtrip import difference, probe
from gossamer.pipeline.job import Job
from gossamer.pipeline.probe_texts import calibration_batches, probe_texts
from gossamer.pipeline.stage import adapted_processor, keep_whole

_BROKEN = 2.0  # a 4-bit Gemma-3-270M, which has lost much, is at 0.3
Taken = tuple[Bundle, dict[str, Any]]


def take_system(call: StepCall, bundle: Bundle, job: Job, seed: int) -> Taken:
    """Build the system of ``call`` and let it do its verb; returns the bundle and notes for the report."""
    companions = job.companions if any(spec.companion for spec in call.entry.options) else {}
    system = call.entry.load()(seed=seed, companions=companions, **call.options)
    return _VERBS[KINDS[call.entry.kind].step](system, bundle, job)


def _attach(system: Any, bundle: Bundle, job: Job) -> Taken:
    bundle.model = system.attach(bundle.model)
    bundle.processor = adapted_processor(system, bundle.processor)
    bundle.adapters.append(system)
    return bundle, {}


def _build(system: Any, bundle: Bundle, job: Job) -> Taken:
    built = system.build(bundle.model)
    bundle.processor = system.processor(bundle.processor)
    bundle.model = built
    return bundle, {"architecture": built.config.model_type}


def _accelerate(system: Any, bundle: Bundle, job: Job) -> Taken:
    system = bundle.parts.get(system.name, system)  # one that an earlier step fitted
    bundle.model, bundle.processor = system.accelerate(bundle.model, bundle.processor)
    bundle.parts[system.name] = system
    return bundle, {}


def _compress(system: Any, bundle: Bundle, job: Job) -> Taken:
    texts = probe_texts(job)
    before = probe(bundle.model, bundle.processor, texts)
    asked = system.calibrates and job.recipe.data is not None
    compressed = system.compress(bundle.model, calibration_batches(job, bundle.processor) if asked else None)
    bundle.model = compressed.model
    found = difference(before, probe(bundle.model, bundle.processor, texts, like=before))
    if system.stands_in:
        keep_whole(job)
    elif not found.kl <= _BROKEN:
        raise GossamerError(
            system.name,
            must=f"leave a model within {_BROKEN:g} nats of the one before (mean KL per token)",
            got=f"{found.kl:.3g} (same first choice {found.agreement:.1%})",
            do="compress less: more bits, smaller groups, a smaller share or speed-up",
        )
    return bundle, {**compressed.report.values, "round_trip": found.as_dict()}


def _decode(system: Any, bundle: Bundle, job: Job) -> Taken:
    bundle.parts[system.name] = system
    return bundle, {}


_VERBS: dict[str, Callable[[Any, Bundle, Job], Taken]] = {
    "accelerate": _accelerate,
    "attach": _attach,
    "build": _build,
    "compress": _compress,
    "decode": _decode,
}
