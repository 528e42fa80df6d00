"""Align: train a small copy a little on general text, so that it is nearer to the model that it stands for.

All weights but the output head (with it a tied embedding) learn the next token of every text; zeros of a sparse copy
stay zero. LoRAM's alignment: the publisher of a model does it once. The step goes on from its last checkpoint when a
run is resumed.
"""

from __future__ import annotations

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.pipeline.job import Job, Row, Step
from gossamer.pipeline.probe_texts import row_text

CARD = Card(
    title="Align",
    claim="the loss of the copy on general text falls",
    requires=("small_copy", "float_weights"),
    forbids=("adapter_attached",),
    provides=("trained",),
    builtin=True,
)


class AlignConfig(Config):
    corpus: str = option("english_prose", "what to learn: a packaged corpus, or data for the recipe's train split")
    texts: int = option(2000, "how many texts of the corpus to draw from", ge=1)
    steps: int = option(100, "optimizer steps", ge=1)
    batch_size: int = option(16, "texts in one forward pass", ge=1)
    accumulation: int = option(1, "forward passes in one step", ge=1)
    max_length: int = option(512, "tokens of a text", ge=8)
    lr: float = option(5e-5, "learning rate at the top of the cosine", gt=0)
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", ge=0, le=1)
    precision: str = option("bf16", "bf16 autocast or fp32", choices=("bf16", "fp32"))
    save_every: int = option(20, "steps between checkpoints that a resumed run goes on from", ge=1, effect="speed")


class Align(Step):
    config_class = AlignConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.parts.small_copies import zeros_kept
        from gossamer.parts.training import TrainSettings, train

        config, model = self.config, bundle.model
        names = ("steps", "batch_size", "accumulation", "max_length", "warmup", "precision", "save_every")
        settings = TrainSettings(**{name: getattr(config, name) for name in names}, seed=self.seed)
        tick = job.reporter.task("align")
        wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(False)
        with zeros_kept(model):
            result = train(
                model,
                bundle.processor,
                self._rows(job),
                objective=registry.find("sft", kind="objectives").load()(seed=self.seed),
                optimizer=registry.find("adamw", kind="optimizers").load()(seed=self.seed, lr=config.lr),
                settings=settings,
                folder=job.scratch,
                progress=lambda step, total, loss: tick(step, total),
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        curve = [(float(step), round(float(loss), 4)) for step, loss in result.curve]
        self.notes = {"alignment_loss": [curve[0][1], curve[-1][1]], "trained_tokens": result.tokens, "curve": curve}
        model.eval()
        return bundle

    def _rows(self, job: Job) -> list[Row]:
        from gossamer.hub.corpora import load_corpus

        if self.config.corpus == "data":
            rows = job.data["train"][: self.config.texts]
        else:
            rows = load_corpus(self.config.corpus, split="train", limit=self.config.texts, seed=self.seed).rows
        return [{"text": row_text(row)} for row in rows]
