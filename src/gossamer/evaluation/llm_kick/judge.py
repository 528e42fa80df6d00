"""A judge compares two summaries of a story, in both orders, on coherence, consistency, fluency and relevance, 1 to 10.

    score = sum over orders of what it gives the subject / sum over orders of what it gives the reference

A judge that favours one place by some amount favours both alike, so equal summaries score 1 whatever its bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError

ASPECTS = ("coherence", "consistency", "fluency", "relevance")
_PROMPT = """Rate two summaries of a story from 1 to 10 on {aspects}.

Story: {story}

Summary 1: {first}

Summary 2: {second}

Give eight numbers: the four for summary 1, then the four for summary 2.
Numbers:"""


@dataclass(frozen=True)
class Verdict:
    """``score`` as in the head of this file; ``swapped``: the better one changed with the order."""

    score: float
    swapped: bool


def as_judge(companion: Any) -> Callable[[str], str]:
    """A callable from prompt to text; a model of transformers (with its tokenizer beside it on disk), or a bundle."""
    if isinstance(companion, nn.Module):
        companion = Bundle(companion, _tokenizer(companion))
    if isinstance(companion, Bundle):
        return _model_judge(companion)
    if not callable(companion):
        raise InputError("judge", must="be a model or a callable from text to text", got=type(companion).__name__)
    return companion


def compare(judge: Callable[[str], str], story: str, summary: str, reference: str) -> Verdict | None:
    """Both orders; None where one of the two replies does not hold eight numbers from 1 to 10."""
    ahead = _numbers(judge(_prompt(story, summary, reference)))
    behind = _numbers(judge(_prompt(story, reference, summary)))
    if ahead is None or behind is None:
        return None
    (mine, theirs), (theirs_first, mine_second) = ahead, behind
    wins = (mine > theirs, mine_second > theirs_first)
    losses = (mine < theirs, mine_second < theirs_first)
    swapped = (wins[0] and losses[1]) or (losses[0] and wins[1])
    return Verdict((mine + mine_second) / (theirs + theirs_first), swapped)


def _prompt(story: str, first: str, second: str) -> str:
    return _PROMPT.format(aspects=", ".join(ASPECTS), story=story, first=first, second=second)


def _numbers(reply: str) -> tuple[int, int] | None:
    """Sums of the first four and the next four numbers."""
    found = [int(number) for number in re.findall(r"\d+", reply)]
    if len(found) < 2 * len(ASPECTS) or not all(1 <= number <= 10 for number in found[:8]):
        return None
    return sum(found[:4]), sum(found[4:8])


def _model_judge(bundle: Bundle) -> Callable[[str], str]:
    from gossamer.parts.generation import generate_texts

    def ask(prompt: str) -> str:
        return generate_texts(bundle.model, bundle.processor, [prompt], max_new_tokens=32, batch_size=1)[0]

    return ask


def _tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    where = getattr(model, "name_or_path", "")
    if not where:
        raise InputError("judge", must="come with a tokenizer", got="a model alone", do="give a Bundle")
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
