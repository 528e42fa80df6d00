"""Loading and streaming for the verbs that talk to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_any(where: str) -> tuple[Any, Any]:
    """A model by name, folder or hub id, or the result in the folder of a run."""
    import gossamer
    from gossamer.pipeline.stage import load_bundle

    for folder in (Path(where) / "result", Path(where)):
        if (folder / "bundle.json").exists():
            bundle = load_bundle(folder)
            return bundle.model.eval(), bundle.processor
    return gossamer.load(where)


class Writer:
    """A model on the decoding runner, as the verbs that talk to one use it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from gossamer.parts.decode_runner import Runner
        from gossamer.parts.generation import end_ids

        self.runner, self.tokenizer, self.settings = Runner(model), tokenizer, model.generation_config
        self.ends = end_ids(model, tokenizer)

    def write(self, text: str, new_tokens: int, temperature: float, seed: int) -> str:
        """Print the continuation as it comes and return it. Sampling keeps the checkpoint's own top_k and top_p."""
        import torch
        from transformers import TextStreamer

        printer, made = TextStreamer(self.tokenizer, skip_special_tokens=True), list[int]()
        ids = self.tokenizer(text)["input_ids"]
        for token in self.runner.stream(
            ids, max_new_tokens=new_tokens, eos=self.ends, choice=self._choice(temperature, seed)
        ):
            made.append(token)
            printer.put(torch.tensor([token]))
        printer.end()
        return str(self.tokenizer.decode(made, skip_special_tokens=True))

    def _choice(self, temperature: float, seed: int) -> Any:
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        from gossamer.parts.requests import Choice

        if temperature <= 0:
            return Choice()
        top_k, top_p = self.settings.top_k, self.settings.top_p
        processors: list[Any] = [TemperatureLogitsWarper(temperature)]
        processors += [TopKLogitsWarper(top_k)] if top_k else []
        processors += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
        return Choice(processors, True, torch.Generator().manual_seed(seed))
