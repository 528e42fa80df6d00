"""Prompt look-up: guesses that a repeated beginning goes on as it did before.

The last n tokens are looked for in what came before, n from ``ngram`` down to 1; the draft is what followed the latest
occurrence. The model verifies it in one step, so the text is its own and only the speed changes: by much where answers
repeat their prompt (editing, quoting, code), not at all elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.decoding import Draft, DrafterDecoding, RequestState
from gossamer.parts.look_up import with_copy

CARD = Card(
    title="Prompt look-up",
    year=2023,
    claim="fewer model steps than tokens where answers repeat their prompt, with the very tokens of plain decoding",
    traits=("lossless",),
    provides=("decoder_set",),
    forbids=("decoder_set",),
    builtin=True,
)


class PromptLookupConfig(Config):
    ngram: int = option(3, "longest run of tokens that is looked for", ge=1, effect="speed")
    tokens: int = option(10, "how many tokens to guess a step", ge=1, effect="speed")
    switch_off: bool = option(True, "stop guessing while it is slower than plain steps", effect="speed")


class PromptLookup(DrafterDecoding):
    config_class = PromptLookupConfig
    config: PromptLookupConfig

    @property
    def draft_tokens(self) -> int:
        return self.config.tokens

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> RequestState:
        return RequestState(prompt)

    def draft(self, states: Sequence[Any], k: int) -> list[Draft]:
        return [with_copy(Draft((), joint=()), state.ids, self.config.ngram, k) for state in states]
