"""Prompts and marks of each task. A prompt that is too long loses worked examples, then evidence, never its question.

facts         "Please give answer to this question: {q}\nThe answer is"   an alias is a substring of the output
choice        worked examples, "Question: {q}\nAnswer:"                   the likeliest choice
letter        worked examples with lettered choices, "Answer:"            one token, the exact letter
closed_book   "Answer these questions:\n\nQ: {q}\nA:"                     answer and output hold one another
open_book     "Based on these texts, answer these questions:" + texts     the same
retrieval     as open_book, about people who do not exist                 the same
summary       "Summarize the given story ..." + story                     ROUGE-L against the reference
instructions  worked examples, "Instruction: {q}\nResponse:"              the one right reply
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from gossamer.core.errors import InputError
from gossamer.evaluation.llm_kick.items import Item
from gossamer.kinds.evaluation import Request, Subject
from gossamer.parts.metrics import cut_first_line, rouge_l

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_HEADER = "The following are multiple choice questions (with answers) about general knowledge.\n\n"
_CLOSED, _OPEN = "Answer these questions:\n\n", "Based on these texts, answer these questions:\n\n"
LETTERS = string.ascii_uppercase


def request(
    task: str, item: Item, examples: Sequence[Item], subject: Subject, *, new_tokens: int, evidence: int
) -> Request:
    """What is asked about ``item``; ``examples`` are worked ones, ``evidence`` the most characters of its context."""
    longest = max(subject.length(choice) for choice in item.choices) if task == "choice" else 0
    new = {"letter": 1, "choice": longest}.get(task, new_tokens)
    build = functools.partial(_PROMPTS[task], item)
    prompt = _fit(build, list(examples), item.context[:evidence], subject, new)
    if task == "facts":
        new = max(1, min(new, 2 * subject.length(prompt)))  # prompt and answer at most three times the prompt
    if task == "choice":
        choices = tuple(f" {choice}" for choice in item.choices)
        return Request(task, prompt, (str(item.gold),), str(item.gold), choices, about=item)
    if task == "letter":
        letter = LETTERS[item.gold]
        return Request(task, prompt, (letter,), f" {letter}", new_tokens=1, line=False, about=item)
    return Request(task, prompt, item.answers, f" {item.answers[0]}", new_tokens=new, about=item)


def mark(output: str, asked: Request) -> float:
    """From 0 to 1, by the rule of the task."""
    if asked.task == "choice":
        return float(output == asked.truth[0])
    if asked.task == "letter":
        return float(output.strip() == asked.truth[0])
    line = cut_first_line(output)
    if asked.task == "facts":
        bare = _bare(line)
        return float(any(_bare(answer) in bare for answer in asked.truth))
    if asked.task == "summary":
        return float(rouge_l([line], [asked.truth[0]])[0]) / 100
    if asked.task == "instructions":
        return float(any(_stripped(line) == _stripped(answer) for answer in asked.truth))
    return float(any(_holds(line, answer) for answer in asked.truth))


def token_f1(output: str, answers: Sequence[str]) -> float:
    """F1 of the words of the first line, the best over the answers."""
    said = Counter(normalised(cut_first_line(output)))
    best = 0.0
    for answer in answers:
        meant = Counter(normalised(answer))
        shared = (said & meant).total()
        best = max(best, 2 * shared / (said.total() + meant.total()) if shared else 0.0)
    return best


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _facts(item: Item, worked: Sequence[Item], context: str) -> str:
    return f"Please give answer to this question: {item.question}\nThe answer is"


def _choice(item: Item, worked: Sequence[Item], context: str) -> str:
    shown = "".join(f"Question: {one.question}\nAnswer: {one.choices[one.gold]}\n\n" for one in worked)
    return f"{shown}Question: {item.question}\nAnswer:"


def _letter(item: Item, worked: Sequence[Item], context: str) -> str:
    shown = "".join(f"{_lettered(one)} {LETTERS[one.gold]}\n\n" for one in worked)
    return f"{_HEADER}{shown}{_lettered(item)}"


def _lettered(item: Item) -> str:
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return f"{item.question}\n{listed}Answer:"


def _closed(item: Item, worked: Sequence[Item], context: str) -> str:
    return f"{_CLOSED}Q: {item.question}\nA:"


def _open(item: Item, worked: Sequence[Item], context: str) -> str:
    return f"{_OPEN}{context}\n\nQ: {item.question}\nA:"


def _summary(item: Item, worked: Sequence[Item], context: str) -> str:
    return f"{item.question}\n\nStory: {context}\n\nSummary:"


def _instruction(item: Item, worked: Sequence[Item], context: str) -> str:
    shown = "".join(f"Instruction: {one.question}\nResponse: {one.answers[0]}\n\n" for one in worked)
    return f"{shown}Instruction: {item.question}\nResponse:"


_PROMPTS: dict[str, Callable[[Item, Sequence[Item], str], str]] = {
    "facts": _facts,
    "choice": _choice,
    "letter": _letter,
    "closed_book": _closed,
    "open_book": _open,
    "retrieval": _open,
    "summary": _summary,
    "instructions": _instruction,
}
TASKS = tuple(_PROMPTS)
WORKED = ("choice", "letter", "instructions")


def _fit(
    build: Callable[[Sequence[Item], str], str],
    worked: list[Item],
    context: str,
    subject: Subject,
    new: int,
) -> str:
    room = subject.room
    while room is not None and (length := subject.length(build(worked, context))) + new > room:
        if worked:
            worked = worked[:-1]
        elif context:
            over = length + new - room
            each = length / len(build(worked, context))  # tokens a character, on the whole
            context = context[: max(0, min(len(context) - 1, int(len(context) - over / each)))]
        else:
            do = "ask shorter questions, or for fewer new tokens"
            raise InputError(
                "evaluation data: question", must=f"fit {room} positions", got=f"{length} and {new} new tokens", do=do
            )
    return build(worked, context)


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text.lower())


def _stripped(text: str) -> str:
    return text.strip().rstrip(".").strip('"')


def _holds(output: str, answer: str) -> bool:
    """Whether the words of one stand in the other without a gap; nothing said holds nothing."""
    said, meant = normalised(output), normalised(answer)
    return bool(said and meant) and (_within(meant, said) or _within(said, meant))


def _within(short: list[str], long: list[str]) -> bool:
    return any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))
