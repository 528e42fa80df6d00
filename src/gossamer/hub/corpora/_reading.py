"""Reads the Python files of installed distributions and of the standard library, and finds repeated text in them.

Files of tests are left out. Every corpus that is read from installed packages splits by top-level package with
``split_of``, so a package is in the same split in all of them, and what a model saw of one corpus never holds the
held-out rows of another.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# all are dependencies of gossamer itself, direct or not, so every installation has them
LIGHT = (
    "absl-py", "accelerate", "click", "datasets", "dill", "filelock", "fonttools", "fsspec", "gguf", "huggingface_hub",
    "Jinja2", "joblib", "markdown-it-py", "matplotlib", "mpmath", "multiprocess", "networkx", "nltk", "numpy",
    "packaging", "pandas", "peft", "pillow", "portalocker", "psutil", "pyarrow", "Pygments", "pyparsing",
    "python-dateutil", "PyYAML", "regex", "rich", "sacrebleu", "safetensors", "sympy", "tqdm", "typer",
)  # fmt: skip
HEAVY = ("torch", "transformers")
STANDARD_LIBRARY = "python"
LICENCE = "as each distribution states: BSD-3-Clause, MIT, Apache-2.0, MIT-CMU and PSF-2.0 in the main"

_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_tests?|idle_test|idlelib|lib2to3|turtledemo|site-packages|dist-packages|__pycache__"
    r"|conftest\.py|test_[^/]*|[^/]*_test\.py|config-[^/]*)(/|$)"
)
_SALT = "gossamer-2179"


@dataclass(frozen=True)
class Module:
    """One source file: its top-level package, dotted name and text."""

    package: str
    name: str
    text: str


@dataclass(frozen=True)
class Function:
    """One documented function: dedented ``source`` with its docstring, and ``bare`` without it."""

    package: str
    where: str
    source: str
    bare: str
    docstring: str
    size: int


def versions(distributions: Iterable[str]) -> tuple[str, ...]:
    """``name==version`` for each; one that is not installed is recorded as ``name==absent``."""
    found = []
    for name in distributions:
        if name == STANDARD_LIBRARY:
            found.append(f"{name}=={platform.python_version()}")
            continue
        try:
            found.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name}==absent")
    return tuple(found)


def split_of(package: str) -> str:
    """The split a top-level package belongs to, by hash: about 80 % train, 10 % validation, 10 % test.

    The salt was picked so that every split has standard and third-party packages and the largest train.
    """
    share = int(hashlib.sha256(f"{_SALT}:{package}".encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < 0.1 else "validation" if share < 0.2 else "train"


def modules(distributions: Iterable[str]) -> Iterator[Module]:
    """The source files of these distributions, in a fixed order; a file that is not UTF-8 Python is passed over."""
    for distribution in distributions:
        for name, path in sorted(set(_python_files(distribution))):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, FileNotFoundError):
                continue
            dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield Module(dotted.partition(".")[0], dotted, text)


def parse(module: Module) -> ast.Module | None:
    """The syntax tree, or None for a file written for another Python (templates, old fixtures)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(module.text)
    except (SyntaxError, ValueError):
        return None


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Qualified name and node of every class, function and method; functions inside functions are left out."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    stack.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.If | ast.Try | ast.With):
                stack.append((prefix, node))


def functions(module: Module) -> Iterator[Function]:
    """The functions and methods of a file that have a docstring and a body beside it."""
    tree = parse(module)
    lines = module.text.split("\n")
    for name, node in definitions(tree) if tree else ():
        if isinstance(node, ast.ClassDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or node.end_lineno is None:
            continue
        first = node.body[0]
        whole = lines[node.lineno - 1 : node.end_lineno]
        start, end = first.lineno - node.lineno, (first.end_lineno or first.lineno) - node.lineno + 1
        source, bare = _dedent(whole), _dedent(whole[:start] + whole[end:])
        if bare.startswith(("def ", "async def ")):
            size = sum(1 for part in node.body[1:] for _ in ast.walk(part))
            yield Function(module.package, f"{module.name}:{name}", source, bare, docstring, size)


def normalised(text: str) -> str:
    """Lower-case words only, every number as 0: two texts with the same form count as one."""
    return " ".join(re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", text.lower())))


class SeenShingles:
    """Remembers the word n-grams of all texts kept so far; tells a text that is mostly made of them."""

    def __init__(self, width: int = 6, share: float = 0.75) -> None:
        self.width, self.share = width, share
        self._seen: set[int] = set()

    def repeats(self, text: str) -> bool:
        """True if at least ``share`` of the n-grams were seen before; a new text is remembered."""
        words = normalised(text).split()
        count = max(1, len(words) - self.width + 1)
        # bytes, not hash(str): the same rows in every process
        grams = {_hash(" ".join(words[start : start + self.width])) for start in range(count)}
        if len(grams & self._seen) >= self.share * len(grams):
            return True
        self._seen |= grams
        return False


def near_duplicates(items: list[frozenset[str]], threshold: float) -> set[int]:
    """Indices of items whose Jaccard similarity to an earlier kept item is at least ``threshold``.

    Exact, by prefix filtering (Chaudhuri, Ganti and Kaushik 2006): with tokens ordered by rarity, two sets that
    similar share a token among the first n - ceil(threshold n) + 1 of each.
    """
    frequency = Counter(token for item in items for token in item)
    index: dict[str, list[int]] = defaultdict(list)
    dropped: set[int] = set()
    for number, item in enumerate(items):
        ordered = sorted(item, key=lambda token: (frequency[token], token))
        prefix = ordered[: len(ordered) - int(-(-threshold * len(ordered) // 1)) + 1]
        others = {other for token in prefix for other in index[token]}
        if any(len(item & items[o]) >= threshold * len(item | items[o]) for o in others):
            dropped.add(number)
            continue
        for token in prefix:
            index[token].append(number)
    return dropped


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines)).rstrip()


def _python_files(distribution: str) -> Iterator[tuple[str, Path]]:
    if distribution == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        pairs = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    else:
        try:
            files = metadata.files(distribution) or []
        except metadata.PackageNotFoundError:
            return
        pairs = ((file.as_posix(), Path(str(file.locate()))) for file in files if file.suffix == ".py")
    for name, path in pairs:
        if not _SKIPPED.search(name) and not name.startswith(("..", "__editable__")):
            yield name, path
