"""Loading and streaming for the verbs that talk to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from gossamer.core.bundle import Bundle

_LOOK_UP = 8  # tokens at most that are looked for in what came before


def load_any(where: str) -> Bundle:
    """A model by name, folder or hub id, or a package or the result of a run with its fitted parts."""
    import gossamer
    from gossamer.core.bundle import Bundle
    from gossamer.core.manifest import is_package
    from gossamer.hub.packages import open_package
    from gossamer.pipeline.stage import load_bundle

    if is_package(Path(where)):
        return open_package(where)
    for folder in (Path(where) / "result", Path(where)):
        if (folder / "bundle.json").exists():
            bundle = load_bundle(folder)
            bundle.model.eval()
            return bundle
    return Bundle(*gossamer.load(where))


class Writer:
    """A model on the decoding runner, with the decoding system among its bundle's parts where there is one.

    Without one, and beside a drafter, what followed earlier occurrences of the last tokens is guessed: on the compiled
    kernels a guess changes no bit of the text.
    """

    def __init__(self, bundle: Bundle) -> None:
        from gossamer.kinds.decoding import Decoding, DrafterDecoding
        from gossamer.parts.generation import end_ids
        from gossamer.pipeline.single import system

        self.model, self.tokenizer = bundle.model, bundle.processor
        self.ends = frozenset(end_ids(self.model, self.tokenizer))
        self.decoder = next((part for part in bundle.parts.values() if isinstance(part, Decoding)), None)
        if isinstance(self.decoder, DrafterDecoding):
            self.decoder.bind(self.model, look_up=_LOOK_UP)
        elif self.decoder is None:
            copying = system("prompt_lookup", ngram=_LOOK_UP)
            self.runner = copying.bind(self.model).runner
            self.decoder = copying if self.runner.native else None

    def write(self, text: str, new_tokens: int, temperature: float, seed: int) -> str:
        """Print the continuation as it comes and return it. Sampling keeps the checkpoint's own top_k and top_p."""
        said = ""
        for piece in self.pieces(self.tokenizer(text)["input_ids"], new_tokens, temperature, seed):
            typer.echo(piece, nl=False)
            said += piece
        typer.echo()
        return said

    def pieces(self, ids: list[int], new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """The continuation of a prompt's tokens, text as it comes, without special tokens."""
        made, text, shown = list[int](), "", 0
        for token in self._tokens(ids, new_tokens, self._choice(temperature, seed)):
            made.append(token)
            text = str(self.tokenizer.decode(made, skip_special_tokens=True))
            # a letter of several tokens is shown when it is whole
            if not text.endswith("\ufffd") and len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if len(text) > shown:
            yield text[shown:]

    @property
    def length(self) -> int:
        """Tokens that a prompt and its continuation may have."""
        from gossamer.parts.decode_runner import MAX_LENGTH

        return min(getattr(self.model.config.get_text_config(), "max_position_embeddings", MAX_LENGTH), MAX_LENGTH)

    def _tokens(self, ids: list[int], count: int, choice: Any) -> Iterator[int]:
        if self.decoder is None:
            yield from self.runner.stream(ids, max_new_tokens=count, eos=self.ends, choice=choice)
            return
        state = self.decoder.open(self.model, ids, self.tokenizer)
        state.choice, state.room, state.ends = choice, count, self.ends
        while state.room:
            for token in self.decoder.step(self.model, [state])[0]:
                yield token
                if token in self.ends:
                    return

    def _choice(self, temperature: float, seed: int) -> Any:
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        from gossamer.parts.requests import Choice

        if temperature <= 0:
            return Choice()
        settings = self.model.generation_config
        processors: list[Any] = [TemperatureLogitsWarper(temperature)]
        processors += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        processors += [TopPLogitsWarper(settings.top_p)] if (settings.top_p or 1) < 1 else []
        return Choice(processors, True, torch.Generator().manual_seed(seed))
