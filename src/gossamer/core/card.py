"""Cards: what a system or step is, read from its source text without importing it.

A file that holds a system has, at module level, ``CARD = Card(...)``, a subclass of ``Config`` whose fields are
``option(...)`` calls, and one public class. All their arguments are literals.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.options import OptionSpec

TRAITS = (
    "identity_at_init", "mergeable", "lora_exportable",  # adapters
    "budgeted", "distils", "converts", "sparse",  # compression
    "lossless", "causal",  # decoding, architectures
    "needs_fit", "needs_reference", "local_weights",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Title, paper and claim of a system; the traits that switch contract laws on; its state facts."""

    title: str
    claim: str
    paper: str = ""  # arXiv number
    year: int = 0
    modality: tuple[str, ...] = ("text",)
    traits: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()  # facts; "a|b" is met by either
    provides: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    registers: tuple[str, ...] = ()  # "peft:mos", "quantizer:finequant", "auto:<model_type>"
    extras: tuple[str, ...] = ()
    families: tuple[str, ...] = ("llama", "gemma3")  # tiny model families that the contract laws use
    limits: str = ""
    builtin: bool = False  # a baseline or tool without a paper


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered system or step: everything that is known without importing it."""

    name: str
    kind: str
    path: str
    module: str
    class_name: str
    summary: str  # first line of the docstring
    doc: str
    card: Card
    options: tuple[OptionSpec, ...]
    origin: str = "gossamer"  # distribution that brings it

    def load(self) -> Any:
        """Import the module and return the public class."""
        import importlib

        return getattr(importlib.import_module(self.module), self.class_name)


def read_entry(path: Path, *, name: str, kind: str, module: str, origin: str = "gossamer") -> Entry | None:
    """Read one source file; ``None`` when it holds no ``CARD``."""
    source = path.read_text(encoding="utf-8")
    if "CARD" not in source:
        return None
    tree = ast.parse(source, filename=str(path))
    card = _read_card(tree, path)
    if card is None:
        return None
    doc = ast.get_docstring(tree) or ""
    return Entry(
        name=name,
        kind=kind,
        path=str(path),
        module=module,
        class_name=_public_class(tree, path),
        summary=doc.splitlines()[0] if doc else card.title,
        doc=doc,
        card=card,
        options=_read_options(tree, path),
        origin=origin,
    )


def _read_card(tree: ast.Module, path: Path) -> Card | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
            if not isinstance(node.value, ast.Call):
                raise InputError(f"{path}: CARD", must="be Card(...) with literal arguments")
            values = _literals(node.value, f"{path}: CARD")
            known = {field.name for field in dataclasses.fields(Card)}
            unknown = set(values) - known
            if unknown:
                raise InputError(f"{path}: CARD", must=f"only use {sorted(known)}", got=sorted(unknown))
            wrong = set(values.get("traits", ())) - set(TRAITS)
            if wrong:
                raise InputError(f"{path}: CARD traits", must=f"be among {TRAITS}", got=sorted(wrong))
            return Card(**values)
    return None


def _literals(call: ast.Call, where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            values[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise InputError(f"{where} {keyword.arg}", must="be a literal", got=ast.unparse(keyword.value)) from None
    return values


def _classes(tree: ast.Module) -> list[tuple[ast.ClassDef, set[str]]]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.append((node, {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}))
    return found


def _public_class(tree: ast.Module, path: Path) -> str:
    from gossamer.core.kinds import BASES

    names = [node.name for node, bases in _classes(tree) if bases & BASES and not node.name.startswith("_")]
    if len(names) != 1:
        raise InputError(str(path), must="hold one public class that derives from a kind's base class", got=names)
    return names[0]


def _read_options(tree: ast.Module, path: Path) -> tuple[OptionSpec, ...]:
    specs = []
    for node, bases in _classes(tree):
        if "Config" not in bases:
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call):
                name = ast.unparse(item.target)
                where = f"{path}: {node.name}.{name}"
                try:
                    default, text = (ast.literal_eval(argument) for argument in item.value.args)
                except ValueError:
                    raise InputError(where, must="be option(literal default, 'help', ...)") from None
                annotation = ast.unparse(item.annotation)
                specs.append(OptionSpec(name, annotation, default, text, **_literals(item.value, where)))
    return tuple(specs)
