"""Concept prompts: extraction, Algorithm 1 (augmentation), and lists for common scenarios.

A concept prompt says in general what a toxic prompt is after. An LLM writes one for a sample; a small base model writes
poor ones, so fixed lists are at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Encoder = Callable[[Sequence[str]], Tensor]
Writer = Callable[[str], str]

EXTRACT = (
    "Say in one short sentence, in general, what the following request is after and why it is harmful. "
    "Be descriptive and clear, specific about the kind of harm, without any detail of the request.\n\nRequest: {prompt}"
)
AUGMENT = (
    "Write 5 short, diverse descriptions of kinds of requests that belong to the same type as this one, "
    "one a line, nothing else.\n\nType: {concept}"
)

CONCEPTS: dict[str, tuple[str, ...]] = {
    "toxic": (
        "asks for help with something harmful",
        "wants to hurt, cheat or frighten other people",
        "seeks instructions that break the law",
        "contains abusive or hateful language",
        "tries to get private information about somebody",
    ),
    "personal_data": (
        "asks for the home address of a private person",
        "wants to find out somebody's phone number without consent",
        "seeks passwords or account details of another person",
        "tries to learn the medical or bank records of someone",
        "asks how to follow where a person goes",
    ),
    "illegal_acts": (
        "asks how to commit a crime",
        "wants to break into a place or steal something",
        "seeks a way to escape the police or hide evidence",
        "asks how to make or sell forbidden goods",
        "wants to avoid taxes unlawfully",
    ),
    "insults": (
        "wants an insult against a person",
        "asks for a message that humiliates somebody",
        "wants to mock a group of people",
        "seeks words to bully a colleague or a pupil",
        "asks for a threatening letter",
    ),
    "fraud": (
        "asks for a message that tricks people out of money",
        "wants to pretend to be a bank or an office",
        "seeks a way to forge a document",
        "asks for a false review or testimony",
        "wants to sell something that does not exist",
    ),
    "malware": (
        "asks for a program that damages computers",
        "wants to get into a system without permission",
        "seeks code that records what others type",
        "asks how to bring down a website",
        "wants to hide a program from virus scanners",
    ),
    "violence": (
        "asks how to injure somebody",
        "wants to build a weapon",
        "seeks to plan an attack on a place",
        "praises an act of violence",
        "asks how to hurt an animal",
    ),
    "hate": (
        "asks for a text against people of one origin",
        "wants proof that one group is worth less",
        "seeks slogans that call for exclusion",
        "asks for a joke about a disability",
        "wants to deny a crime against a people",
    ),
}  # fmt: skip


def extract(samples: Sequence[str], writer: Writer) -> list[str]:
    """One concept prompt for each toxic sample, in order; empty answers are left out."""
    answers = (_lines(writer(EXTRACT.format(prompt=sample))) for sample in samples)
    return [lines[0] for lines in answers if lines]


def augment(concepts: Sequence[str], writer: Writer, encode: Encoder, threshold: float, limit: int) -> list[str]:
    """Algorithm 1: let the LLM vary every concept, keep what is unlike all that is kept, until a round keeps nothing.

    A description is kept when its largest cosine similarity with everything kept so far, from whatever concept, is
    below ``threshold``. ``limit`` ends it earlier.
    """
    kept = list(concepts)
    grew = bool(kept)
    while grew and len(kept) < limit:
        grew = False
        for concept in list(kept):
            longer = distinct(_lines(writer(AUGMENT.format(concept=concept)))[:5], encode, threshold, limit, kept)
            grew = grew or len(longer) > len(kept)
            kept = longer
    return kept


def distinct(
    texts: Sequence[str], encode: Encoder, threshold: float, limit: int, kept: Sequence[str] = ()
) -> list[str]:
    """``kept`` and those of ``texts``, in order, that are below ``threshold`` to all before them; at most ``limit``."""
    out = list(kept)
    if not texts:
        return out
    vectors = torch.nn.functional.normalize(encode([*out, *texts]).float(), dim=-1)
    chosen = list(range(len(out)))
    for number in range(len(kept), len(kept) + len(texts)):
        if len(out) >= limit:
            break
        if not chosen or float((vectors[chosen] @ vectors[number]).max()) < threshold:
            chosen.append(number)
            out.append(texts[number - len(kept)])
    return out


def trigrams(texts: Sequence[str]) -> Tensor:
    """Sentence vectors [n, 4096] without a model: hashed counts of letter trigrams."""
    table = torch.zeros(len(texts), 4096)
    for row, text in enumerate(texts):
        padded = f"  {text.lower()} "
        for start in range(len(padded) - 2):
            # the built-in hash differs between processes
            code = 0
            for char in padded[start : start + 3]:
                code = (code * 1_000_003 + ord(char)) % 4093
            table[row, code] += 1
    return table


def _lines(text: str) -> list[str]:
    """Lines without bullets, numbers and quotes."""
    cleaned = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip().strip('"').strip() for line in text.splitlines())
    return [line for line in cleaned if line]
