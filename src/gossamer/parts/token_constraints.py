"""Token constraints: answers that fit a JSON schema or a regular expression, token by token.

    grammars = Grammars(tokenizer, vocabulary_size, ends)
    processor = GrammarProcessor(grammars.json_schema(schema), start=len(prompt))
    choice = Choice([processor, *others])       # or model.generate(..., logits_processor=[processor])

After the new tokens t_1 .. t_k of a row the scores s [V] become

    s'_v = s_v   if some text of the grammar begins with the bytes of t_1 .. t_k v,
                 or v is an end token and t_1 .. t_k is whole
         = -inf  otherwise

llguidance keeps the place in the grammar and gives the set of such v as bits. Where only one text is possible it lets
the tokenizer's own tokens of that text pass and no other spelling of it. A text that can go no further leaves the end
tokens alone. The place is found from the ids of each call: new ones are taken in, those that are gone (a rejected
guess, another beam) are rolled back.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# a blank, or a line's end and its indent: without a bound a small model may write blanks for ever
WHITESPACE = r" |\n {0,16}"
# all are set, since a schema may bring settings of its own under "x-guidance"
_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,
}
# of a time that is written with a fraction of a second, which no format bounds either: down to nanoseconds
_TIMES, _FRACTION = ("time", "date-time"), r"^[^.]*(\.[0-9]{1,9}([^0-9.].*)?)?$"
_VALUES = ("const", "default", "enum", "examples")  # keywords that hold values and no schemas
_CHECKED_REFS = 100  # of a schema with more references, unending ones are not looked for
_TABLES: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What :class:`Grammars` makes: a matcher at its beginning, whose masks have ``words`` of 32 bits, the model's
    vocabulary size and its end tokens."""

    matcher: LLMatcher
    words: int
    vocabulary_size: int
    ends: frozenset[int]


class Grammars:
    """Makes grammars over the tokens of ``tokenizer`` for scores of ``vocabulary_size``.

    ``ends`` are the tokens that end an answer, of which there must be one. Reading a vocabulary takes seconds where it
    is large; it is done once a tokenizer. Rows of the model beyond the tokenizer's tokens are never allowed, nor are
    special tokens that are no ends. Raises InputError for a tokenizer that is not of the tokenizers library or whose
    tokens' bytes are not known, and MissingExtra without llguidance.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, ends: Iterable[int]) -> None:
        self.vocabulary_size, self.ends = vocabulary_size, frozenset(ends)
        if not self.ends or not all(0 <= end < vocabulary_size for end in self.ends):
            must = f"have end tokens among the model's {vocabulary_size}"
            do = "set eos_token_id in the model's generation config"
            raise InputError("grammars", must=must, got=sorted(self.ends), do=do)
        self._table = _table(tokenizer, vocabulary_size, self.ends)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that ``schema`` allows, its properties in the order in which the schema has them; times have at most
        nine digits of a second's fraction.

        Raises InputError where no value can satisfy it, where it uses keywords that cannot be held to token by token
        (such as ``not``, ``if``, ``uniqueItems``), and where it is no schema.
        """
        from llguidance import LLMatcher

        where = "JSON schema"
        if not isinstance(schema, Mapping):
            raise InputError(where, must="be an object", got=type(schema).__name__)
        try:
            text = json.dumps(_bounded(schema), allow_nan=False)
            grammar = self._grammar(where, LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))
            unending = _unending(schema)
        except (RecursionError, TypeError, ValueError) as error:
            raise InputError(where, must="be plain JSON, not nested too deeply", got=_line(str(error))) from error
        if unending:
            do = "let the recursion end: make a property optional, or allow null"
            raise InputError(where, must="allow a value that ends", got="required parts that hold themselves", do=do)
        return grammar

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Texts that ``pattern`` matches as a whole, in the syntax of Rust's regex crate: no look-around, no
        back-references. InputError for others, and where it matches nothing."""
        from llguidance import LLMatcher

        if not isinstance(pattern, str):
            raise InputError("regex", must="be a string", got=type(pattern).__name__)
        return self._grammar("regex", LLMatcher.grammar_from_regex(pattern))

    def _grammar(self, where: str, text: str) -> Grammar:
        from llguidance import LLMatcher

        words = -(-self._table.vocab_size // 32)
        grammar = Grammar(LLMatcher(self._table, text, log_level=0), words, self.vocabulary_size, self.ends)
        error = grammar.matcher.get_error()
        if error:
            raise InputError(where, must="be one that tokens can be held to", got=_line(error), do=_advice(error))
        place = _Place(grammar)
        place.allowed(())
        if place.problem:
            raise InputError(where, must="allow some text", got="one that nothing matches", do="loosen it")
        return grammar


class GrammarProcessor:
    """Scores [n, V] of rows input_ids [n, t] -> scores in which what ``grammar`` forbids after ``start`` is -inf.

    One for each request or call of ``model.generate``; put it before processors that cut by rank. Nothing is raised
    while tokens are chosen, since others may be in the same step: where an answer cannot go on (another processor
    forced a token, or the grammar grew beyond its limits) only end tokens are left, ``problem`` says why, a warning is
    given, and :meth:`finished` is false.
    """

    def __init__(self, grammar: Grammar, start: int) -> None:
        self.grammar, self.start = grammar, start
        self._rows: list[_Place] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[1] >= self.start, (input_ids.shape, self.start)
        new = input_ids[:, self.start :].tolist()
        while len(self._rows) < len(new):
            self._rows.append(_Place(self.grammar))
        bits = np.stack([row.allowed(ids) for row, ids in zip(self._rows, new, strict=False)])
        allowed = torch.from_numpy(bits.view(np.bool_)).to(scores.device)
        if self.problem:
            warnings.warn(f"an answer cannot go on within its grammar: {self.problem}", stacklevel=2)
        return torch.where(allowed, scores, -torch.inf)

    @property
    def problem(self) -> str:
        """Why a row could not go on when it was last asked for; empty where all could."""
        return next((row.problem for row in self._rows if row.problem), "")

    def finished(self, ids: Sequence[int] | Tensor) -> bool:
        """Whether what follows ``start`` in one row of ids, with or without an end token, is whole."""
        row = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else list(ids)
        place = _Place(self.grammar)
        return place.move(row[self.start :]) and place.matcher.is_accepting()


class _Place:
    """Where one row stands in a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar, self.matcher = grammar, grammar.matcher.deep_copy()
        self.taken: list[int] = []
        self.problem = ""

    def move(self, ids: Sequence[int]) -> bool:
        """Go to the place after ``ids``, or as far as the grammar allows; whether that was all. What follows an end
        is padding."""
        text = list(ids)
        over = not self.grammar.ends.isdisjoint(text)
        if over:
            del text[next(n for n, token in enumerate(text) if token in self.grammar.ends) :]
        if self.matcher.is_error():  # it stays in that state
            self.matcher, self.taken = self.grammar.matcher.deep_copy(), []
        if text[: len(self.taken)] != self.taken:
            same = next(n for n, (a, b) in enumerate(zip([*text, None], self.taken, strict=False)) if a != b)
            self.matcher.rollback(len(self.taken) - same)
            del self.taken[same:]
        new = text[len(self.taken) :]
        self.taken += new[: self.matcher.try_consume_tokens(new) if new else 0]
        return len(self.taken) == len(text) and (not over or self.matcher.is_accepting())

    def allowed(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """1 for each token that may follow ``ids``: uint8 [V]."""
        size, self.problem = self.grammar.vocabulary_size, ""
        if not self.move(ids):
            self.problem = f"token {ids[len(self.taken)]} does not fit it"
        elif self.grammar.ends.isdisjoint(ids):
            words = np.zeros(self.grammar.words, np.uint32)
            self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
            if self.matcher.is_error():
                self.problem = _line(self.matcher.get_error())
            elif not bits.any() or (self.matcher.is_stopped() and not self.matcher.is_accepting()):
                self.problem = "no token of the vocabulary fits it"
            else:
                return bits
        bits = np.zeros(size, np.uint8)
        bits[list(self.grammar.ends)] = 1
        return bits


def _table(tokenizer: Any, size: int, ends: frozenset[int]) -> LLTokenizer:
    """The vocabulary as llguidance reads it, kept while the tokenizer lives."""
    try:
        import llguidance.hf
    except ImportError as error:
        raise MissingExtra("token constraints", "serve") from error
    with _LOCK:
        made = _TABLES.setdefault(tokenizer, {})
        key = (len(tokenizer), size, ends)
        if key not in made:
            try:
                # tokens that the model has no row for are cut off later; llguidance wants to know them
                made[key] = llguidance.hf.from_tokenizer(tokenizer, max(size, _tokens(tokenizer)), sorted(ends))
            except ValueError as error:
                must, do = "be a fast one whose tokens are bytes", "constrain answers with another model"
                raise InputError("tokenizer", must=must, got=_line(str(error)), do=do) from error
        return made[key]


def _tokens(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _line(text: str) -> str:
    """The first sentence of what llguidance says; the state of the parser that may follow is for its authors."""
    return " ".join(text.split("<state>")[0].split())[:300]


def _advice(error: str) -> str:
    if "Unimplemented" in error:
        return "leave these keywords out and check them afterwards"
    if "oneOf" in error:
        return "use anyOf"
    if "nsatisfiable" in error:
        return "loosen it: no value satisfies it"
    return "mend it"


def _bounded(node: Any) -> Any:
    """``node`` with an end to the fraction of a second in each time that has no pattern and no values of its own."""
    if isinstance(node, list):
        return [_bounded(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    made = {key: child if key in _VALUES else _bounded(child) for key, child in node.items()}
    free = node.get("format") in _TIMES and not node.keys() & {"const", "enum"}
    return {"pattern": _FRACTION, **made} if free else made


def _unending(schema: Any) -> bool:
    """Whether every value that ``schema`` allows would have to hold itself, by way of its own references."""
    targets = {ref: _pointed(schema, ref) for ref in {*_references(schema)}}
    if len(targets) > _CHECKED_REFS:
        return False
    ending = {ref for ref, target in targets.items() if target is None}  # not ours: llguidance judges
    while found := {ref for ref in targets.keys() - ending if _ends(targets[ref], ending)}:
        ending |= found
    return not _ends(schema, ending)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def _pointed(schema: Any, reference: str) -> Any:
    """What a JSON pointer within ``schema`` points at; None where it is none."""
    node, (head, *steps) = schema, reference.split("/")
    if head != "#":
        return None
    for step in steps:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def _ends(node: Any, ending: set[str]) -> bool:
    """Whether ``node`` allows a value of finite depth, the references ``ending`` doing so. Where in doubt it does."""
    if not isinstance(node, Mapping) or "enum" in node or "const" in node:
        return True
    if "$ref" in node and node["$ref"] not in ending:
        return False
    for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        options = node.get(key)
        if isinstance(options, list) and options and not enough(_ends(option, ending) for option in options):
            return False
    types = node.get("type")
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not {*map(str, types)} <= {"object", "array"}:
        return True
    parts = {"object": _required, "array": _first_items}
    return not types or any(all(_ends(part, ending) for part in parts[kind](node)) for kind in types)


def _required(node: Mapping[str, Any]) -> list[Any]:
    properties, names = node.get("properties"), node.get("required")
    properties = properties if isinstance(properties, Mapping) else {}
    return [properties.get(str(name), node.get("additionalProperties")) for name in names or ()]


def _first_items(node: Mapping[str, Any]) -> list[Any]:
    first, least = node.get("prefixItems"), node.get("minItems")
    first, least = list(first) if isinstance(first, list) else [], least if isinstance(least, int) else 0
    return [*first[:least], *([node.get("items")] if least > len(first) else [])]
