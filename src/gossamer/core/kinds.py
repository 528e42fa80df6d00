"""The kinds of system: folder, verb, result. A kind without a base class yet is only this row."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    folder: str
    verb: str
    result: str
    bases: tuple[str, ...] = ()  # base classes in gossamer.kinds.<folder>; empty until the first system comes
    step: str = ""  # what a recipe step of this kind does; empty where it is no step of its own
    option_of: str = ""  # where such a system is named instead


_ROWS = (
    Kind("adapters", "attach(model)", "model", ("TunerAdapter", "ModuleAdapter"), step="attach"),
    Kind("objectives", "loss(model, batch)", "Loss", ("Objective",), option_of="train.objective"),
    Kind("optimizers", "build(params)", "torch.optim.Optimizer", ("Optimizer",), option_of="train.optimizer"),
    Kind("compression", "compress(model, data)", "Compressed", ("Compression",), step="compress"),
    Kind("acceleration", "accelerate(model, processor)", "(model, processor)", ("Acceleration",), step="accelerate"),
    Kind("architectures", "build(base)", "PreTrainedModel", ("Architecture",), step="build"),
    Kind("decoding", "processor(model) | drafter(model) | loop(model, inputs)", "tokens",
         ("ProcessorDecoding", "DrafterDecoding", "FittedDrafter", "LoopDecoding"), step="decode"),
    Kind("prompting", "solve(llm, item)", "Answer"),
    Kind("guards", "judge(item)", "Verdict", ("Guard",), option_of="fit.system"),
    Kind("editing", "edit(model, facts)", "Edit"),
    Kind("retrieval", "encode(texts) | index(documents) | rank(query, documents)", "Ranking"),
    Kind("graphs", "fit(graph) | predict(graph, nodes)", "predictions"),
    Kind("applications", "apply(inputs)", "Result", ("Application",)),
    Kind("evaluation", "evaluate(subject, data)", "Scores", ("Evaluation",), option_of="measure.quantities"),
    Kind("distributed", "plan(job) | launch(job)", "Job"),
)  # fmt: skip

KINDS: dict[str, Kind] = {row.folder: row for row in _ROWS}
BASES: set[str] = {base for row in _ROWS for base in row.bases} | {"Step"}
