"""From a request's body to what the engine is asked: prompts in tokens, sampling, grammar, stages; or a clear 400."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Sequence
from typing import Any

from gossamer.core.errors import GossamerError, OptionError
from gossamer.parts.data_tokens import encode_prompt
from gossamer.serving.engine import Engine
from gossamer.serving.errors import ApiError, bad
from gossamer.serving.sampling import Sampling
from gossamer.serving.schema import ChatRequest, CompletionRequest, Format, Generation
from gossamer.serving.sequences import Ask

COMPLETION_TOKENS = 16  # of a completion that names no max_tokens, as in the OpenAI API
_GRAMMARS = 64  # that are remembered


class Translator:
    """Of one engine. ``prompt_tokens``: the longest prompt; ``None``: what the model has room for."""

    def __init__(self, engine: Engine, prompt_tokens: int | None = None) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.tokenizer("a")  # the first call may change its settings, which threads must not do to one another
        self.longest = min(prompt_tokens or engine.max_length, engine.max_length - 1)
        self._grammars: Any = None
        self._made: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def chat(self, body: ChatRequest) -> list[Ask]:
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise bad("max_tokens and max_completion_tokens are the same: give one", "max_tokens")
        if body.top_logprobs is not None and not body.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        roles = {"developer": "system"}
        turns = [{"role": roles.get(turn.role, turn.role), "content": turn.text} for turn in body.messages]
        try:
            prompt = encode_prompt(turns, self.tokenizer)
        except GossamerError as error:
            raise bad(f"messages: {error}", "messages") from error
        judged = [turn["content"] for turn in turns if turn["role"] != "assistant"]
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        return self._asks(body, [(prompt, judged)], "messages", most, top, body.response_format)

    def completion(self, body: CompletionRequest) -> list[Ask]:
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad("best_of must equal n: all answers are returned", "best_of", "unsupported_parameter")
        if body.echo and body.logprobs is not None:
            raise bad("echo together with logprobs is not offered", "echo", "unsupported_parameter")
        prompts = []
        for one in prompts_of(body.prompt):
            if isinstance(one, str):
                prompts.append((self.tokens(one), [one]))
            else:
                self.known(one, "prompt")
                prompts.append((one, [str(self.tokenizer.decode(one, skip_special_tokens=True))]))
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._asks(body, prompts, "prompt", most, body.logprobs, None)

    def echoed(self, body: CompletionRequest) -> list[str]:
        """The prompt before each answer, where it is to be shown."""
        if not body.echo:
            return []
        texts = [one if isinstance(one, str) else self.tokenizer.decode(one) for one in prompts_of(body.prompt)]
        return [text for text in texts for _ in range(body.n or 1)]

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, at least the beginning of a text."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        return ids or ([] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id])

    def known(self, ids: Sequence[int], param: str) -> None:
        size = self.engine.vocabulary_size
        wrong = next((token for token in ids if token >= size), None)
        if wrong is not None:
            raise bad(f"{param}: token {wrong} is none of the model's {size}", param)

    def warm(self) -> None:
        """Read the vocabulary for grammars now and not at the first request that has one."""
        with self._lock:
            if self._grammars is None:
                from gossamer.parts.token_constraints import Grammars

                self._grammars = Grammars(self.tokenizer, self.engine.vocabulary_size, self.engine.ends)

    def _asks(
        self,
        body: Generation,
        prompts: Sequence[tuple[list[int], list[str]]],
        param: str,
        most: int | None,
        top_logprobs: int | None,
        form: Any,
    ) -> list[Ask]:
        if body.stream_options is not None and not body.stream:
            raise bad("stream_options needs stream: true", "stream_options")
        choices, room = body.n or 1, self.engine.capacity.slots + self.engine.capacity.queue
        if len(prompts) * choices > room:
            wanted = f"{len(prompts)} prompts of {choices} answers" if len(prompts) > 1 else f"{choices} answers"
            raise bad(f"n: {wanted} are more than this server holds at once ({room})", "n")
        lengths = [self._length(prompt, param, most, body) for prompt, _ in prompts]
        stages = self._stages(body)
        sampling = Sampling(
            temperature=_or(body.temperature, 1.0),
            top_p=_or(body.top_p, 1.0),
            top_k=body.top_k,
            presence=_or(body.presence_penalty, 0.0),
            frequency=_or(body.frequency_penalty, 0.0),
            bias=self._bias(body),
            seed=body.seed,
            top_logprobs=top_logprobs,
            grammar=self._grammar(body, form),
        )
        asks: list[Ask] = []
        for (prompt, judged), length in zip(prompts, lengths, strict=True):
            for _ in range(choices):
                ask = Ask(prompt, length, len(asks), sampling, body.stops, judged, stages)
                asks.append(ask)
        return asks

    def _length(self, prompt: Sequence[int], param: str, most: int | None, body: Generation) -> int:
        """How many tokens the answer may have."""
        if not prompt:
            raise bad(f"{param} must hold at least one token", param)
        if len(prompt) > self.longest:
            message = f"{param}: {len(prompt)} tokens, at most {self.longest} are taken"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        room = self.engine.max_length - len(prompt)
        if most is not None and most > room:
            asked = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
            if body.max_tokens is None and getattr(body, "max_completion_tokens", None) is None:
                return room  # the default, where less is left
            message = f"{asked}: {len(prompt)} tokens of the prompt leave room for {room}, got {most}"
            raise ApiError(400, message, param=asked, code="context_length_exceeded")
        return room if most is None else most

    def _stages(self, body: Generation) -> frozenset[str]:
        try:
            return self.engine.stages.on(body.gossamer.stages if body.gossamer else {}, "gossamer.stages")
        except OptionError as error:
            raise bad(str(error), "gossamer.stages") from error

    def _bias(self, body: Generation) -> dict[int, float]:
        found = {}
        for token, value in (body.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and int(token[:12]) < self.engine.vocabulary_size):
                must = f"from 0 to {self.engine.vocabulary_size - 1}"
                raise bad(f"logit_bias: keys must be token ids {must}, got {token[:40]!r}", "logit_bias")
            found[int(token[:12])] = value
        return found

    def _grammar(self, body: Generation, form: Format | None) -> Any:
        wanted = None if form is None or form.type == "text" else form
        param = "response_format" if body.guided_regex is None else "guided_regex"
        if wanted is not None and body.guided_regex is not None:
            raise bad("guided_regex and response_format both say what the answer must be: give one", param)
        if wanted is None and body.guided_regex is None:
            return None
        key = json.dumps(wanted.model_dump() if wanted is not None else body.guided_regex, sort_keys=True)
        try:
            self.warm()
            with self._lock:
                if key not in self._made:
                    self._made[key] = self._make(wanted, body.guided_regex)
                self._made.move_to_end(key)
                while len(self._made) > _GRAMMARS:
                    self._made.popitem(last=False)
                return self._made[key]
        except GossamerError as error:
            raise bad(f"{param}: {error}", param, "unsupported_grammar") from error

    def _make(self, form: Any, regex: str | None) -> Any:
        if form is None:
            return self._grammars.regex(regex)
        if form.type == "json_object":
            return self._grammars.json_object()
        if form.type == "regex":
            return self._grammars.regex(form.pattern)
        return self._grammars.json_schema(form.json_schema.schema_)


def constrained(body: Generation) -> bool:
    """Whether the answer has to fit a grammar."""
    form = getattr(body, "response_format", None)
    return body.guided_regex is not None or (form is not None and form.type != "text")


def prompts_of(given: Any) -> list[Any]:
    """A prompt or a list of them, each a text or token ids, as a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
