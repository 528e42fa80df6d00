"""Builds the report of a run from what lies in its folder, writes report.json and report.html."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator
from typing import Any

from gossamer.core.paths import write_json
from gossamer.core.report import Arm, BudgetLine, Comparison, Report, Sample, StepRecord, Value, measured
from gossamer.pipeline.arms import FEW_SHOT, GGUF, LABELS, RESULT, UNTOUCHED, prompt_and_answer, read_arm
from gossamer.pipeline.costs import read_costs
from gossamer.pipeline.job import Job

_SAMPLES = 10
_HIDDEN = ("scored_tokens",)


def build_report(job: Job, done: list[dict[str, Any]]) -> Report:
    """The report object; also written beside the run as JSON and as one HTML page."""
    from gossamer.hub.models import resolve
    from gossamer.parts.measure import environment
    from gossamer.parts.report_html import write_html

    records = _records(job)
    found = environment()
    data = job.data.about if job.recipe.data else {}
    report = Report(
        title=f"{job.recipe.model}: " + ", ".join(record["step"] for record in done),
        model=job.recipe.model,
        data=_describe(data),
        seed=job.recipe.seed,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device={key: found[key] for key in ("device", "cores", "memory_bytes", "threads", "system", "python")},
        versions=found["versions"],
        arms=_arms(job, records),
        comparisons=_comparisons(records),
        steps=[StepRecord(r["step"], r["options"], r["seconds"], _flat(r["changed"])) for r in done],
        samples=_samples(job, records),
        curves={f"training loss, step {r['index'] + 1}": [tuple(p) for p in r["curve"]] for r in done if r["curve"]},
        notes=[*resolve(job.recipe.model).notes, *_data_notes(data), *_evaluation_notes(records)],
        baseline=UNTOUCHED if UNTOUCHED in records else "",
        result=RESULT if RESULT in records else "",
    )
    report.budget = _budget(job, report)
    write_html(report, job.folder / "report.html")
    write_json(job.folder / "report.json", report.as_dict())  # last: it says that the run is done
    return report


def _records(job: Job) -> dict[str, dict[str, Any]]:
    """Measured arms in the order in which a reader wants them: untouched first, the result last."""
    folder = job.folder / "arms"
    names = [path.stem for path in sorted(folder.glob("*.json")) if path.stem != "costs"] if folder.exists() else []
    order = {UNTOUCHED: 0, FEW_SHOT: 1, RESULT: 9}
    return {name: read_arm(job, name) for name in sorted(names, key=lambda name: (order.get(name, 5), name))}


def _arms(job: Job, records: dict[str, dict[str, Any]]) -> list[Arm]:
    from gossamer.parts.metrics import summarise

    costs = read_costs(job)
    arms = []
    for name, record in records.items():
        arm = Arm(name, record["label"], untouched=name in (UNTOUCHED, FEW_SHOT))
        for metric, scores in record["scores"].items():
            arm.values[metric] = summarise(metric, scores, seed=job.recipe.seed)
        for metric, value in {**record["values"], **costs.get(name, {})}.items():
            if metric not in _HIDDEN and value is not None:
                arm.values[metric] = _value(metric, value)
        for evaluation, found in record.get("evaluations", {}).items():
            arm.values |= {_quantity(evaluation, task): _scored(one) for task, one in found["tasks"].items()}
        arms.append(arm)
    if GGUF in costs:
        values = {metric: _value(metric, value) for metric, value in costs[GGUF].items()}
        arms.insert(0, Arm(GGUF, LABELS[GGUF], values, "the file that the weights come from", untouched=True))
    return arms


def _value(metric: str, value: Any) -> Value:
    return measured(metric, *value) if isinstance(value, list) else measured(metric, value)


def _comparisons(records: dict[str, dict[str, Any]]) -> list[Comparison]:
    """The result against every other arm, item by item, on each task metric and each task of an evaluation."""
    from gossamer.parts.metrics import compare

    if RESULT not in records:
        return []
    evaluations = list(_evaluation_comparisons(records))
    if not records[RESULT]["scores"]:
        return evaluations
    others = [name for name, record in records.items() if name != RESULT and record["scores"]]
    result = records[RESULT]["scores"]
    return [
        *(
            compare(metric, RESULT, other, result[metric], records[other]["scores"][metric])
            for metric in ("chrf", "rouge_l")
            for other in others
        ),
        *evaluations,
    ]


def _evaluation_comparisons(records: dict[str, dict[str, Any]]) -> Iterator[Comparison]:
    from gossamer.parts.metrics import compare

    for evaluation, found in records[RESULT].get("evaluations", {}).items():
        for task, one in found["tasks"].items():
            for other, record in records.items():
                theirs = record.get("evaluations", {}).get(evaluation, {}).get("tasks", {}).get(task)
                if other == RESULT or theirs is None or one["better"] != "higher" or one["n"] != theirs["n"]:
                    continue
                mine, rival = ([100 * item for item in row["items"]] for row in (one, theirs))
                made = compare(_quantity(evaluation, task), RESULT, other, mine, rival)
                unit = dataclasses.replace(made.difference, unit="%", better="higher")
                yield dataclasses.replace(made, difference=unit)


def _evaluation_notes(records: dict[str, dict[str, Any]]) -> list[str]:
    """Tasks that say nothing because the untouched model is at chance there."""
    notes = []
    for evaluation, found in records.get(UNTOUCHED, {}).get("evaluations", {}).items():
        chances = [
            f"{task} ({100 * one['value']:.0f} % against {100 * one['chance']:.0f} % by chance)"
            for task, one in found["tasks"].items()
            if not one["informative"]
        ]
        if chances:
            notes.append(f"{evaluation}, uninformative, for the untouched model is at chance: {', '.join(chances)}")
    return notes


def _quantity(evaluation: str, task: str) -> str:
    return f"{evaluation} {task}"


def _scored(one: dict[str, Any]) -> Value:
    """Marks as per cent; what is better when lower (perplexity) as it is."""
    factor, unit = (100.0, "%") if one["better"] == "higher" else (1.0, "")
    value, low, high = (factor * one[key] for key in ("value", "low", "high"))
    return Value(value, low, high, unit, one["n"], one["better"])


def _samples(job: Job, records: dict[str, dict[str, Any]]) -> list[Sample]:
    answered = {name: record["outputs"] for name, record in records.items() if "outputs" in record}
    if not answered:
        return []
    samples = []
    for place, row in enumerate(job.data["test"][:_SAMPLES]):
        prompt, answer = prompt_and_answer(row)
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        samples.append(Sample(shown, answer.strip(), {name: outputs[place] for name, outputs in answered.items()}))
    return samples


def _budget(job: Job, report: Report) -> list[BudgetLine]:
    arms = {arm.name: arm.values for arm in report.arms}
    result = arms.get(RESULT, {})
    asked = job.recipe.budget
    lines = []
    bytes_bounds = (("size_mb", asked.size_mb, "total_bytes"), ("memory_mb", asked.memory_mb, "peak_rss_bytes"))
    for name, bound, metric in bytes_bounds:
        if bound is not None and metric in result:
            value = result[metric].value
            lines.append(BudgetLine(name, bound * 1e6, value, value <= bound * 1e6, "bytes"))
    if asked.tokens_per_s is not None and "tokens_per_s" in result:
        value = result["tokens_per_s"].value
        lines.append(BudgetLine("tokens_per_s", asked.tokens_per_s, value, value >= asked.tokens_per_s, "tokens/s"))
    if asked.task_drop is not None and "chrf" in result:
        best = max(values["chrf"].value for name, values in arms.items() if name in (UNTOUCHED, FEW_SHOT))
        drop = max(0.0, 1 - result["chrf"].value / best)
        lines.append(BudgetLine("task_drop", asked.task_drop, drop, drop <= asked.task_drop))
    return lines


def _flat(changed: dict[str, Any]) -> dict[str, Any]:
    """Nested notes as dotted names, one line each in the report."""
    flat: dict[str, Any] = {}
    for key, value in changed.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def _describe(data: dict[str, Any]) -> str:
    return f"{data['name']} (sha256 {data['sha256'][:12]})" if data else "none"


def _data_notes(data: dict[str, Any]) -> list[str]:
    notes = []
    if "licence" in data:
        notes.append(f"Data: {data['licence']}")
    if "sources" in data:
        notes.append("Read from " + ", ".join(data["sources"]))
    return notes
