"""ToxicDetector: toxic prompts seen in the hidden states that generation computes anyway.

With e^(l) [d] the input of block l at the last token of a text, u a prompt and t one of C concept prompts ("asks how to
commit a crime"), the feature of u is

    f = concat over t and l of  e_u^(l) * e_t^(l)            in R^(C L d)

standardised by the training rows and judged by a five-layer network (200, 100, 50, 20, 1). Concepts come from rows
labelled "concept", from an LLM (companion ``writer``, a callable from prompt to text) by extraction and Algorithm 1, or
from the lists that are shipped; a scenario without any stands for itself by its name, with a warning. ``feature``
"inner" is the authors' earlier variant, max_t <e_u^(l), e_t^(l)> per layer; "last" uses e_u alone.

Standardising leaves little of the concepts in the product: (e_u e_t - mean) / std = sign(e_t) (e_u - mean_u) / std_u,
whatever their size. The feature is then the standardised state of all layers, C times with signs. It is kept as the
paper has it; what it is worth against "last" is for the experiment to say.

Different from the paper: the similarity filter uses letter trigrams where no sentence encoder (companion ``encoder``,
a callable from texts to vectors) is given; the 300 character limit on training prompts is left to who brings the data.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.guards.toxicdetector import classifier
from gossamer.guards.toxicdetector.classifier import Detector
from gossamer.guards.toxicdetector.concepts import CONCEPTS, augment, distinct, extract, trigrams
from gossamer.kinds.base import State
from gossamer.kinds.guards import CONCEPT, REFUSAL, Guard, Verdict, labelled, seeded
from gossamer.parts.data_tokens import encode_prompt
from gossamer.parts.hidden_states import decoder_blocks, last_token_states, watch

CARD = Card(
    title="ToxicDetector",
    paper="2408.11727",
    year=2024,
    claim="higher F1 and fewer false alarms than lexical and last-layer classifiers on look-alikes and wrapped prompts",
    traits=("needs_fit",),
    provides=("guard_fitted",),
    limits="jailbreak corpora and 7B models are not at hand; the published F1 values are not shown here",
)


class ToxicDetectorConfig(Config):
    feature: str = option("product", "what is made of prompt and concept", choices=("product", "inner", "last"))
    layers: str = option("all", "block inputs that are used: all, last, or numbers such as 0,6,12")
    concepts: int = option(5, "concept prompts per scenario", ge=1)
    similarity: float = option(0.8, "a concept is kept where its similarity to all others is below this", gt=0, le=1.01)
    encoder: str | None = option(None, "sentence encoder of the filter; letter trigrams without one", companion=True)
    writer: str | None = option(None, "LLM that extracts and augments concepts", companion=True)
    per_scenario: bool = option(False, "one detector a scenario, the highest score counts")
    chat_template: bool = option(False, "read prompts and concepts as user turns of the chat template")
    epochs: int = option(100, "passes over the training rows", ge=1)
    patience: int | None = option(None, "stop after so many epochs without a lower held-out loss", ge=1)
    threshold: float = option(0.5, "scores from here on are flagged", ge=0, le=1)
    target_fpr: float | None = option(
        None, "set the threshold for this false-positive rate on held-out rows", ge=0, lt=1
    )


class ToxicDetector(Guard):
    config_class = ToxicDetectorConfig
    config: ToxicDetectorConfig

    @property
    def threshold(self) -> float:
        if self.config.target_fpr is None or self.state is None:
            return self.config.threshold
        return float(self.state.values["threshold"])

    def judge(self, item: str) -> Verdict:
        overall, named = self.scores([item])
        return self.verdict(float(overall[0]), {name: float(values[0]) for name, values in named.items()})

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores float64 [n] of many prompts, and by scenario where there is a detector for each."""
        for text in texts:
            self.check(text)
        return self._score(self._states(self._model, self._tokenizer, texts))

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[Any]:
        with watch(model, self._layers) as seen:
            yield lambda: self._score(seen.states().cpu())[0]

    def refusal_tokens(self) -> list[int]:
        return list(self._tokenizer(REFUSAL, add_special_tokens=False)["input_ids"])

    def learn(self, bundle: Any, data: Any) -> State:
        """Fit on rows ``{"text", "label": "toxic" | "benign" | "concept", "scenario"}``."""
        self._layers = _layers(self.config.layers, len(decoder_blocks(bundle.model)))
        rows, classes = labelled(data, f"{self.name}.fit")
        self._enough(classes)
        toxic = torch.tensor(classes, dtype=torch.float32)
        scenarios = [str(row.get("scenario") or "toxic") for row in rows]
        named = sorted({name for name, value in zip(scenarios, classes, strict=True) if value})
        with seeded(self.seed):
            concepts = {} if self.config.feature == "last" else self._concepts(data, named)
            texts = [text for name in concepts for text in concepts[name]]
            owners = [name for name in concepts for _ in concepts[name]]
            states = self._states(bundle.model, bundle.processor, [row["text"] for row in rows])
            concept_states = self._states(bundle.model, bundle.processor, texts) if texts else states[:0]
            detectors, cuts = {}, list[Tensor]()
            for name in named if self.config.per_scenario else [""]:
                mine = torch.tensor([not value or name in ("", s) for s, value in zip(scenarios, classes, strict=True)])
                own = torch.tensor([name in ("", owner) for owner in owners], dtype=torch.bool)
                detectors[name], benign = self._detector(states[mine], toxic[mine], concept_states[own])
                cuts.append(benign)
        threshold = self.config.threshold
        if self.config.target_fpr is not None:
            # one fifth of the benign rows, the same for every detector: the highest score of a row counts
            threshold = classifier.threshold_at(torch.stack(cuts).amax(0), self.config.target_fpr)
        values = {
            "threshold": threshold,
            "layers": self._layers,
            "detectors": list(detectors),
            "concepts": [{"scenario": owner, "text": text} for owner, text in zip(owners, texts, strict=True)],
        }
        return State({"concepts": concept_states, **classifier.pack(detectors)}, values)

    def ready(self, bundle: Any) -> None:
        assert self.state is not None
        self._model, self._tokenizer = bundle.model, bundle.processor
        self._layers = list(self.state.values["layers"])
        concepts = self.state.tensors["concepts"]
        owners = [concept["scenario"] for concept in self.state.values["concepts"]]
        self._detectors: dict[str, Detector] = {}
        for number, name in enumerate(self.state.values["detectors"]):
            own = concepts[torch.tensor([name in ("", owner) for owner in owners], dtype=torch.bool)]
            width = self.state.tensors[f"{number}.mean"].numel()
            with seeded(self.seed):
                blank = Detector(self.config.feature, own, width)
            self._detectors[name] = classifier.unpack(blank, number, self.state.tensors)

    def _enough(self, classes: Sequence[int]) -> None:
        needed = 1 + (self.config.patience is not None) + (self.config.target_fpr is not None)
        fewest = min(sum(classes), len(classes) - sum(classes))
        if fewest < needed:
            raise InputError(
                f"{self.name}.fit",
                must=f"get {needed} rows of each class, since some are held out",
                got=fewest,
                do="add rows, or leave patience and target_fpr out",
            )

    def _detector(self, states: Tensor, classes: Tensor, concepts: Tensor) -> tuple[Detector, Tensor]:
        """A trained detector, and its scores on the benign rows that were held out for the threshold."""
        spare = torch.zeros(len(classes), dtype=torch.bool)
        if self.config.target_fpr is not None:
            # drawn by the seed alone, so that all detectors hold out the same benign rows
            with seeded(self.seed):
                benign = (classes == 0).nonzero()[:, 0]
                count = max(1, int(classifier.HELD_OUT * len(benign)))
                spare[benign[torch.randperm(len(benign))[:count]]] = True
        width = classifier.FEATURES[self.config.feature](states[:1], concepts).shape[1]
        detector = Detector(self.config.feature, concepts, width)
        classifier.train(
            detector, states[~spare], classes[~spare], epochs=self.config.epochs, patience=self.config.patience
        )
        return detector, detector.scores(states[spare]) if bool(spare.any()) else torch.empty(0)

    def _score(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        named = {name: detector.scores(states) for name, detector in self._detectors.items()}
        overall = torch.stack(list(named.values())).amax(0)
        return overall, {name: values for name, values in named.items() if name}

    def _states(self, model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """Block inputs at the last token of each text, float32 [n, L, d]."""
        asked = [[{"role": "user", "content": text}] if self.config.chat_template else text for text in texts]
        rows = [encode_prompt(prompt, tokenizer) for prompt in asked]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise InputError(self.name, must="get texts of at least one token", got=repr(text))
        room = getattr(model.config, "max_position_embeddings", None)
        return last_token_states(model, [row[-room:] if room else row for row in rows], self._layers)

    def _concepts(self, data: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> dict[str, list[str]]:
        """Concept prompts by scenario: given, written, shipped, or the scenario's name."""
        encode = trigrams if self.config.encoder is None else self.companion(self.config.encoder)
        limit, threshold = self.config.concepts, self.config.similarity
        out: dict[str, list[str]] = {}
        for name in scenarios:
            mine = [row for row in data if (row.get("scenario") or "toxic") == name]
            given = [str(row["text"]) for row in mine if row["label"] == CONCEPT]
            if not given and self.config.writer is not None:
                writer = self.companion(self.config.writer)
                samples = [str(row["text"]) for row in mine if row["label"] == "toxic"]
                first = distinct(extract(samples[:limit], writer), encode, threshold, limit)
                out[name] = augment(first, writer, encode, threshold, limit)
            else:
                out[name] = distinct(given or CONCEPTS.get(name, ()), encode, threshold, limit)
            if not out[name]:
                warnings.warn(f"{self.name}: no concepts for {name!r}, so its name stands for it", stacklevel=2)
                out[name] = [name.replace("_", " ")]
        return out


def _layers(text: str, blocks: int) -> list[int]:
    """Block numbers from the option ``layers``; negative ones count from the end."""
    if text in ("all", "last"):
        return list(range(blocks)) if text == "all" else [blocks - 1]
    try:
        found = sorted({int(part) % blocks if -blocks <= int(part) < blocks else blocks for part in text.split(",")})
    except ValueError:
        found = [blocks]
    if blocks in found:
        must = f"be all, last, or numbers from {-blocks} to {blocks - 1}"
        raise OptionError("toxicdetector.layers", must=must, got=repr(text), do="separate numbers by commas")
    return found
