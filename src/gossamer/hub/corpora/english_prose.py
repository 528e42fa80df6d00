"""English technical prose: the docstrings, comments and descriptions of installed distributions, as paragraphs.

Rows: ``text`` (one clean paragraph on one line), ``source`` (package.module:qualname, or module#comments, or
distribution/METADATA), ``package``. Rows with the same source stand together and in order, so they can be joined
to longer documents. Examples, code blocks, tables and section titles are taken out; a paragraph that is mostly made
of six-word sequences seen before is dropped, held-out splits first, so what repeats across splits leaves train.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from gossamer.hub.corpora import _reading
from gossamer.hub.corpora._reading import HEAVY, LICENCE, LIGHT, STANDARD_LIBRARY, Module, SeenShingles

__all__ = ["LICENCE", "build", "sources"]

_DISTRIBUTIONS = (STANDARD_LIBRARY, *LIGHT, *HEAVY)
_COMMON = frozenset(
    re.findall(r"\w+", "the a an of to in is are and or for with that this be it as by on if not when from can")
)
_RULE = re.compile(r"^\s*([-=~^*#_+.]{3,}|[+|][-=+|\s]+|<.*>|\.\. .*|:\w[^:]*:.*|@\w+.*|\|.*)\s*$")
_MARKS = (
    (re.compile(r"<[^>\n]{1,200}>"), ""),
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),
    (re.compile(r":[\w:+-]+:`~?([^`<\n]*?)\s*(<[^`\n]*>)?`"), r"\1"),
    (re.compile(r"`+([^`\n]*)`+_*"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"\[`?([^\]`\n]+)`?\]"), r"\1"),
    (re.compile(r"(?<!\w)~\.?(?=\w)"), ""),
    (re.compile(r"(?<!\w)\*([^*\s][^*\n]*)\*(?!\w)"), r"\1"),
    (re.compile(r"^(TODO|NOTE|XXX|FIXME|HACK|Note)\b(\([^)]*\))?:?"), ""),
    (re.compile(r"[ \t]+"), " "),
)


def sources() -> tuple[str, ...]:
    """What is read, as name==version."""
    return _reading.versions(_DISTRIBUTIONS)


def build() -> dict[str, list[dict[str, Any]]]:
    """Read, clean, drop repeats, split by package."""
    documents: dict[str, list[tuple[str, str, str]]] = {"test": [], "validation": [], "train": []}
    for package, source, text in _texts():
        documents[_reading.split_of(package)].append((package, source, text))
    seen = SeenShingles()
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in documents}
    for split, entries in documents.items():
        for package, source, text in entries:
            for paragraph in paragraphs(text):
                if not seen.repeats(paragraph):
                    splits[split].append({"text": paragraph, "source": source, "package": package})
    return splits


def paragraphs(text: str) -> Iterator[str]:
    """Clean prose paragraphs of a docstring, comment or description (reStructuredText or Markdown)."""
    block: list[str] = []
    for line in [*_prose_lines(text), ""]:
        if line.strip():
            block.append(line)
            continue
        for part in _entries(block):
            clean = " ".join(part.split())
            for pattern, replacement in _MARKS:
                clean = pattern.sub(replacement, clean)
            clean = clean.strip().strip("-*# ")
            if _is_prose(clean):
                yield clean
        block = []


def _texts() -> Iterator[tuple[str, str, str]]:
    """(package, source, raw text) of everything that is read."""
    for module in _reading.modules(_DISTRIBUTIONS):
        tree = _reading.parse(module)
        if tree is None:
            continue
        yield module.package, module.name, ast.get_docstring(tree) or ""
        for name, node in _reading.definitions(tree):
            yield module.package, f"{module.name}:{name}", ast.get_docstring(node) or ""
        for text in _long_strings(tree):
            yield module.package, f"{module.name}#strings", inspect.cleandoc(text)
        yield module.package, f"{module.name}#comments", _comments(module)
    for distribution in (*LIGHT, *HEAVY):
        try:
            description = metadata.metadata(distribution).json.get("description", "")
        except metadata.PackageNotFoundError:
            continue
        package = next((module.package for module in _reading.modules([distribution])), distribution)
        yield package, f"{distribution}/METADATA", str(description)


def _long_strings(tree: ast.Module) -> Iterator[str]:
    """Texts kept in module-level assignments and calls, such as documentation added from outside a class."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr) and statement.value is not None:
            if isinstance(statement.value, ast.Constant):
                continue
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 120:
                    yield node.value


def _comments(module: Module) -> str:
    """Comment lines of a file; runs of neighbouring lines make a paragraph each."""
    out = []
    for line in module.text.split("\n"):
        stripped = line.strip()
        out.append(stripped.lstrip("#!: ") if stripped.startswith("#") else "")
    return "\n".join(out)


def _prose_lines(text: str) -> Iterator[str]:
    """The lines of ``text`` without fenced and indented code, console examples, rules, titles and directives."""
    fenced = example = False
    literal = -1
    lines = text.expandtabs().split("\n")
    for number, line in enumerate(lines):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            yield ""
            continue
        example = (example or stripped.startswith((">>>", "In [", "$ "))) and bool(stripped)
        if literal >= 0 and stripped and indent <= literal:
            literal = -1
        if fenced or example or literal >= 0:
            continue
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        title = len(following) > 2 and set(following) <= set("-=~^*#") and len(stripped) <= len(following) + 20
        if stripped.endswith("::") or stripped.startswith(".. "):
            literal = indent
        if title or _RULE.match(line) or stripped.startswith(("#", "%", "\\")):
            yield ""
        else:
            yield line.replace("::", ":") if stripped.endswith("::") else line


def _entries(block: list[str]) -> Iterator[str]:
    """Parts of a block: list items, and field entries (``name : type`` with the meaning indented below it)."""
    part: list[str] = []
    base = min((len(line) - len(line.lstrip()) for line in block), default=0)
    for line in block:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        field = re.match(r"^[\w*`, .]{1,60}\s?(\([^)]*\))?\s?:(\s|$)", stripped) is not None
        item = re.match(r"^([-*+•]|\d+[.)])\s", stripped) is not None
        if part and (item or field or (indent == base and len(part[-1]) - len(part[-1].lstrip()) > indent)):
            yield " ".join(part)
            part = []
        part.append(line)
    if part:
        yield " ".join(part)


def _is_prose(text: str) -> bool:
    words = text.split()
    if not 8 <= len(words) <= 400 or not text.isascii():
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    plain = sum(re.fullmatch(r"[A-Za-z'-]+[.,;:!?)]?", word) is not None for word in words)
    common = sum(word.lower() in _COMMON for word in words)
    return letters >= 0.85 * len(text) and plain >= 0.7 * len(words) and common >= max(2, 0.12 * len(words))
