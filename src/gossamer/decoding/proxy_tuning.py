"""Proxy-tuning: a large model takes on the tuning of a small one, at decoding time.

M is the base, M- a small untuned model (anti-expert), M+ the same tuned (expert); s(.) [V] are their logits for the
same continuation. Every token is drawn from

    p(x_t | x_<t) = softmax( s_M + alpha (s_M+ - s_M-) )   ~   p_M (p_M+ / p_M-)^alpha

Raw logits are summed, in float32, before any ban, penalty, temperature or top-p. Each model keeps its own past and may
have its own prompt: the expert can see the prompt in its chat template, with a system prompt and the beginning of its
answer, while the other two see it plain. Where a small model has head rows beyond the base's they are cut; rows of the
base beyond the shared vocabulary stand for no token and get no probability.

``top_k_access`` is the case of a base that shows only its k best log-probabilities: the shift is added to those k and
the rest is out. Companions: ``expert`` and ``anti_expert`` (a model, or a Bundle with its tokenizer), or an ``expert``
that is a PEFT model and no anti-expert: M+ is then the model with its adapter, M- without, sharing all other weights.

Besides decoding, ``score`` gives token log-probabilities of answers and ``combined`` a module whose ``forward`` returns
the summed logits, for perplexity. Different from the paper: Llama-2 models are not at hand, so no 13B or 70B figures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.decoding import ProcessorDecoding, RequestState
from gossamer.parts.data_tokens import encode_border
from gossamer.parts.several_models import CachedModel, Row

CARD = Card(
    title="Proxy-tuning",
    paper="2401.08565",
    year=2024,
    claim="the base with the small pair's shift beats base and small expert and closes half of the gap to tuning it",
    provides=("decoder_set",),
    forbids=("decoder_set",),
    limits="13B and 70B benchmark scores are not shown here",
)


class ProxyTuningConfig(Config):
    expert: str = option("expert", "the tuned small model M+", companion=True)
    anti_expert: str | None = option(
        None, "the untuned small model M-; without one, the expert with its PEFT adapter off", companion=True
    )
    alpha: float = option(1.0, "strength of the shift; 0 is the base model", ge=0)
    expert_chat_template: bool = option(False, "show the expert the prompt as a user turn in its chat template")
    system_prompt: str | None = option(None, "system turn of the template; without a template, text before the prompt")
    response_prefix: str | None = option(None, "beginning of the answer that only the expert is given")
    top_k_access: int | None = option(None, "how many of the base's best tokens are visible; all where not given", ge=1)
    trace: bool = option(False, "report each token's probability before and after the shift", effect="report")


class _ProxyState(RequestState):
    """The base's request, and rows of both small models."""

    def __init__(self, prompt: Sequence[int], expert_prompt: Sequence[int]) -> None:
        super().__init__(prompt)
        self.expert_prompt = list(expert_prompt)
        self.expert, self.anti = Row(), Row()
        self.trace: list[dict[str, Any]] = []
        self.shown: tuple[Tensor, Tensor] | None = None  # log-probabilities [V] before and after the last shift

    def accept(self, token: int) -> None:
        super().accept(token)
        if self.shown is not None:
            self.trace.append(_entry(token, *self.shown))
            self.shown = None

    def rewind(self, count: int) -> None:
        super().rewind(count)
        if count:
            self.shown = None
            del self.trace[len(self.tokens) :]
            self.expert.crop(min(self.expert.length, len(self.expert_prompt) + len(self.tokens) - 1))
            self.anti.crop(min(self.anti.length, len(self.ids) - 1))

    def fork(self) -> Self:
        twin = super().fork()
        twin.expert, twin.anti, twin.trace = self.expert.fork(), self.anti.fork(), list(self.trace)
        return twin

    def pending(self) -> tuple[list[int], list[int]]:
        """What expert and anti-expert have not seen; at least the last token, whose logits are wanted."""
        news = []
        for row, prompt in ((self.expert, self.expert_prompt), (self.anti, self.prompt)):
            ids = prompt + self.tokens
            row.crop(min(row.length, len(ids) - 1))
            news.append(ids[row.length :])
        return news[0], news[1]


class ProxyTuning(ProcessorDecoding):
    config_class = ProxyTuningConfig
    config: ProxyTuningConfig
    _pair: tuple[CachedModel, CachedModel] | None = None
    _warned = False

    def check(self, model: Any, inputs: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        super().check(model)
        expert, expert_tokenizer = self._expert()
        if self.config.anti_expert is None and not hasattr(expert, "disable_adapter"):
            raise InputError(
                f"{self.name}: anti_expert",
                must="be given where the expert is no PEFT model",
                got=type(expert).__name__,
                do="name the untuned small model, or give an expert that carries a LoRA",
            )
        others = [("expert", expert, expert_tokenizer)]
        if self.config.anti_expert is not None:
            others.append((self.config.anti_expert, *_unpack(self.companion(self.config.anti_expert))))
        for name, other, own in others:
            super().check(other)
            _same_tokens(f"{self.name}: {name}", model, tokenizer, other, own)
        if self.config.expert_chat_template and not getattr(expert_tokenizer or tokenizer, "chat_template", None):
            raise InputError(
                f"{self.name}: expert_chat_template",
                must="find a chat template",
                got="a tokenizer without one, or none",
                do="give the expert as a Bundle with its tokenizer, or leave the option out",
            )

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> _ProxyState:
        return _ProxyState(prompt, self._expert_prompt(prompt, tokenizer))

    def shift(self, states: Sequence[Any], scores: Tensor) -> Tensor:
        shifted = scores
        if self.config.alpha or self.config.top_k_access:
            shifted = self._combine(scores, *self._companions(states)) if self.config.alpha else self._visible(scores)
        if self.config.trace:
            for state, before, after in zip(states, scores.log_softmax(-1), shifted.log_softmax(-1), strict=True):
                state.shown = (before, after)
        return shifted

    def summary(self, state: Any) -> dict[str, Any]:
        """With ``trace``: ``tokens`` (see :func:`_entry`) and ``changed``, the share whose argmax the shift changed."""
        if not self.config.trace:
            return {}
        changed = sum(entry["changed"] for entry in state.trace) / max(1, len(state.trace))
        return {"tokens": state.trace, "changed": changed}

    @torch.no_grad()
    def score(self, model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Tensor]:
        """Log-probabilities [tokens] (nats, float32) of each answer's tokens after its prompt, per pair of texts.

        Tokens that ``top_k_access`` hides have -inf. Prompts may differ between models as in decoding.
        """
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            head, tail = encode_border(prompt, answer, tokenizer)
            if not tail:
                raise InputError(f"{self.name}.score", must="get answers with a token", got=repr(answer))
            state = self.open(model, head, tokenizer)
            keep, seen = [len(tail)], tail[:-1]
            base = self.base(model).forward([Row()], [state.prompt + seen], keep).logits[0]
            if self.config.alpha:
                expert, anti = self._models()
                plus = expert.forward([Row()], [state.expert_prompt + seen], keep).logits[0]
                minus = anti.forward([Row()], [state.prompt + seen], keep).logits[0]
                base = self._combine(base, plus, minus)
            else:
                base = self._visible(base)
            table = base.log_softmax(-1)
            scores.append(table.gather(-1, torch.tensor(tail, device=table.device)[:, None])[:, 0])
        return scores

    def combined(self, model: Any) -> nn.Module:
        """A module whose ``forward(input_ids, attention_mask)`` gives the summed logits, all models on the same ids."""
        if self.config.expert_chat_template or self.config.system_prompt or self.config.response_prefix:
            raise InputError(
                f"{self.name}.combined",
                must="show all models the same text",
                got="a prompt of the expert's own",
                do="use score(model, tokenizer, prompts, answers)",
            )
        self.check(model)
        return _Combined(model, *self._models(), self._combine)

    def _expert(self) -> tuple[Any, Any]:
        return _unpack(self.companion(self.config.expert))

    def _models(self) -> tuple[CachedModel, CachedModel]:
        if self._pair is None:
            expert, _ = self._expert()
            if self.config.anti_expert is None:
                self._pair = CachedModel(expert), CachedModel(expert, expert.disable_adapter)
            else:
                self._pair = CachedModel(expert), CachedModel(_unpack(self.companion(self.config.anti_expert))[0])
        return self._pair

    def _companions(self, states: Sequence[_ProxyState]) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of expert and anti-expert for the next token of each state."""
        expert, anti = self._models()
        news = [state.pending() for state in states]
        plus = expert.forward([state.expert for state in states], [own for own, _ in news]).logits
        minus = anti.forward([state.anti for state in states], [plain for _, plain in news]).logits
        return torch.cat(plus), torch.cat(minus)

    def _combine(self, base: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
        """Base logits [..., V] (or log-probabilities) and the small models' -> float32 [..., V]."""
        shared = min(base.shape[-1], expert.shape[-1], anti.shape[-1])
        delta = expert[..., :shared].float() - anti[..., :shared].float()
        if not self._warned and not bool(delta.any()):
            warnings.warn(f"{self.name}: expert and anti-expert are identical, so there is no effect", stacklevel=2)
            self._warned = True
        out = torch.full_like(base, -torch.inf, dtype=torch.float32)
        out[..., :shared] = base[..., :shared].float() + self.config.alpha * delta.to(base.device)
        return self._visible(base, out)

    def _visible(self, base: Tensor, shifted: Tensor | None = None) -> Tensor:
        """-inf for all but the base's best ``top_k_access`` tokens."""
        shifted = base if shifted is None else shifted
        if self.config.top_k_access is None:
            return shifted
        best = base.topk(min(self.config.top_k_access, base.shape[-1]), dim=-1).indices
        return torch.full_like(shifted, -torch.inf).scatter(-1, best, shifted.gather(-1, best))

    def _expert_prompt(self, prompt: Sequence[int], tokenizer: Any) -> list[int]:
        config = self.config
        if not (config.expert_chat_template or config.system_prompt or config.response_prefix):
            return list(prompt)
        own = self._expert()[1] or tokenizer
        if own is None:
            raise InputError(f"{self.name}: a prompt of the expert's own", must="have a tokenizer", do="give one")
        text = own.decode(prompt, skip_special_tokens=True)
        if not config.expert_chat_template:
            text = "\n\n".join(part for part in (config.system_prompt, text) if part)
            return own(text + (config.response_prefix or ""))["input_ids"]
        turns = [{"role": "user", "content": text}]
        if config.system_prompt:
            turns.insert(0, {"role": "system", "content": config.system_prompt})
        asked = own.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return own(asked + (config.response_prefix or ""), add_special_tokens=False)["input_ids"]


class _Combined(nn.Module):
    """The three models as one, without caches."""

    def __init__(self, base: Any, expert: CachedModel, anti: CachedModel, combine: Callable[..., Tensor]) -> None:
        super().__init__()
        self.base, self.expert, self.anti = base, expert.model, anti.model
        self.config, self.device = base.config, base.device
        self._contexts, self._sum = (expert.context, anti.context), combine

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Any:
        """input_ids [b, t] -> logits float32 [b, t, V]."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs["use_cache"] = False
        base = self.base(**inputs).logits
        with self._contexts[0]():
            expert = self.expert(**inputs).logits
        with self._contexts[1]():
            anti = self.anti(**inputs).logits
        return CausalLMOutput(logits=self._sum(base, expert, anti))


def _entry(token: int, before: Tensor, after: Tensor) -> dict[str, Any]:
    """One token of the trace: its probability before and after the shift, whether the best token changed, which five
    tokens gained most probability, and KL(before || after) in nats."""
    gain = after.exp() - before.exp()
    held = before > -torch.inf
    return {
        "token": token,
        "before": float(before[token].exp()),
        "after": float(after[token].exp()),
        "changed": int(before.argmax()) != int(after.argmax()),
        "risen": gain.topk(min(5, len(gain))).indices.tolist(),
        "kl": float((before.exp() * (before - after))[held].sum()),
    }


def _unpack(companion: Any) -> tuple[Any, Any]:
    return (companion.model, companion.processor) if isinstance(companion, Bundle) else (companion, None)


def _rows(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _same_tokens(where: str, model: Any, tokenizer: Any, other: Any, own: Any) -> None:
    """Refuse a small model whose ids mean other tokens than the base's, or that has too few of them."""
    if tokenizer is None:
        if min(_rows(other), _rows(model)) < min(model.config.vocab_size, other.config.vocab_size):
            raise InputError(where, must="have the base's vocabulary", got=f"{_rows(other)} rows")
        return
    vocabulary = tokenizer.get_vocab()
    needed = max(vocabulary.values()) + 1
    if _rows(other) < needed:
        raise InputError(
            where, must=f"have a head row for each of the tokenizer's {needed} tokens", got=f"{_rows(other)} rows"
        )
    if own is None or own is tokenizer:
        return
    theirs = own.get_vocab()
    wrong = [token for token, number in vocabulary.items() if theirs.get(token) != number]
    if wrong:
        raise InputError(
            where,
            must="have the base's tokenizer",
            got=f"{len(wrong)} tokens with other ids, {wrong[0]!r} among them",
            do="take a small model of the same family",
        )
