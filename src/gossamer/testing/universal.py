"""Laws for every system: its card, its names, its options, its seed, what it leaves alone, what it refuses.

The module of a kind says how a system is used there:

    subject(system, bench) -> dict      fresh inputs of the verb, by name
    outcome(system, subject) -> value   what comes of using it: tensors and plain values, nested
    KEPT                                names in the subject that must be as before afterwards
    bad_inputs(system, bench)           (what, callable) pairs that must be refused with a UsageError
    reloaded(system, bench, folder)     optional: the outcome before saving to ``folder``, and after loading
    QUICK                               optional: options that save time, used where a system has them
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.core.card import TRAITS, Entry
from gossamer.core.errors import OptionError, UsageError, did_you_mean
from gossamer.core.facts import FACTS
from gossamer.core.hook import TRIGGERS
from gossamer.core.options import EFFECTS, OptionSpec
from gossamer.core.registry import PACKAGE
from gossamer.testing.bench import FAMILIES, Bench
from gossamer.testing.comparison import differs, frozen
from gossamer.testing.running import harness, law

TESTS = PACKAGE.parent.parent / "tests"
CONTEXTS = 6  # values of another option that are tried beside the one under test


@law(once=True)
def check_card_is_complete(entry: Entry, bench: Bench) -> None:
    """Title, and unless builtin claim, paper and year; known traits, facts and families; what it registers is there."""
    card = entry.card
    missing = [name for name in ("title", "claim", "paper", "year") if not getattr(card, name)]
    missing = [name for name in missing if name == "title" or not card.builtin]
    assert not missing, f"the card has no {', '.join(missing)}"
    assert not card.paper or re.fullmatch(r"\d{4}\.\d{4,5}|\S.*\D.*", card.paper), f"paper: {card.paper!r}"
    assert entry.doc.strip(), "the file has no docstring"
    facts = {
        part
        for name in ("requires", "provides", "removes", "forbids")
        for f in getattr(card, name)
        for part in f.split("|")
    }
    for what, used, known in (
        ("traits", card.traits, TRAITS),
        ("facts", facts, FACTS),
        ("families", card.families, FAMILIES),
    ):
        unknown = sorted(set(used) - set(known))
        assert not unknown, f"unknown {what} {unknown}; {did_you_mean(unknown[0], known)}"
    assert card.families, "the card names no family"
    entry.load()
    for item in card.registers:
        assert _registered(item), f"registers {item!r}, and nothing of that name is there after import"


@law(once=True)
def check_names_agree(entry: Entry, bench: Bench) -> None:
    """File, module, registry and class name one thing; test and experiment have its name."""
    cls = entry.load()
    path = Path(entry.path)
    stem = path.parent.name if path.stem == "__init__" else path.stem
    assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.name), f"{entry.name!r} is not snake_case"
    assert stem == entry.name, f"the file is {stem}, the name {entry.name}"
    assert cls.__module__ == entry.module, f"{cls.__name__} is of {cls.__module__}, not {entry.module}"
    assert cls.__module__.rsplit(".", 1)[-1] == entry.name, (
        f"the system calls itself {cls.__module__.rsplit('.', 1)[-1]}"
    )
    if entry.origin != "gossamer" or not TESTS.is_dir():
        return
    assert _test_file(entry).is_file(), f"there is no {_test_file(entry).relative_to(TESTS.parent)}"
    experiment = PACKAGE / "experiments" / entry.kind / f"{entry.name}.py"
    assert entry.card.builtin or experiment.is_file(), f"there is no {experiment.relative_to(PACKAGE)}"


@law(once=True)
def check_options_refuse(entry: Entry, bench: Bench) -> None:
    """A wrong type, a value beyond a bound and an unknown name are each refused with the right sentence."""
    cls = entry.load()
    for spec in entry.options:
        assert spec.help, f"{spec.name} has no help"
        assert spec.effect in EFFECTS, f"{spec.name} has effect {spec.effect!r}"
        for value, words in _forbidden(spec):
            message = _refusal(cls, {spec.name: value}, f"{spec.name}={value!r}")
            missing = [word for word in (f"{entry.name}.{spec.name}: must ", *words) if word not in message]
            assert not missing, f"{spec.name}={value!r} is refused with {message!r}, which lacks {missing}"
    known = [spec.name for spec in entry.options]
    near = f"{known[0]}x" if known else "unknown"
    message = _refusal(cls, {near: 1}, f"the unknown option {near}")
    hint = did_you_mean(near, known)
    assert hint in message, f"the unknown option {near} is refused with {message!r}, which lacks {hint!r}"


@law(once=True)
def check_no_option_is_inert(entry: Entry, bench: Bench) -> None:
    """Some value of each option changes what comes out, alone or beside one other; other effects have a named test."""
    if harness(entry) is None:
        return
    base = base_options(entry, bench)
    tried: dict[str, Any] = {}
    for spec in entry.options:
        if spec.effect == "output":
            assert _moves(entry, bench, spec, base, tried), (
                f"{spec.name} is inert: no value of it changes the outcome, not beside any other option either"
            )
        elif entry.origin == "gossamer" and TESTS.is_dir():
            tests = _test_names(_test_file(entry))
            assert any(spec.name in name for name in tests), (
                f"{spec.name} has effect {spec.effect!r}, and no test of {_test_file(entry).name} has it in its name"
            )


@law()
def check_same_seed_same_result(entry: Entry, bench: Bench) -> None:
    """The outcome follows from inputs, options and seed alone, whatever the state of the global generators."""
    if harness(entry) is None:
        return
    found = []
    for state in (1, 2):
        with _generators(state):
            found.append(run(entry, bench, base_options(entry, bench), seed=3))
    difference = differs(*found)
    assert not difference, f"the same seed gives two results under two global random states: {difference}"


@law()
def check_inputs_and_global_state_are_untouched(entry: Entry, bench: Bench) -> None:
    """Batches, rows, tokenizer, config (and the model, where it is only read) and the process are as before."""
    module = harness(entry)
    if module is None:
        return
    system = build(entry, bench, base_options(entry, bench))
    subject = module.subject(system, bench)
    before = {name: frozen(subject[name]) for name in module.KEPT}
    # a state that no earlier use can have left behind, or setting a seed would go unseen
    with _generators(time.time_ns() % 2**31):
        world = _world()
        module.outcome(system, subject)
        after = _world()
    for name in module.KEPT:
        difference = differs(before[name], frozen(subject[name]))
        assert not difference, f"{name} is changed: {difference}"
    difference = differs(world, after)
    assert not difference, f"global state is changed: {difference}"


@law()
def check_save_and_load_give_the_same(entry: Entry, bench: Bench) -> None:
    """What is saved and loaded again does what it did before."""
    module = harness(entry)
    if module is None or not hasattr(module, "reloaded"):
        return
    system = build(entry, bench, base_options(entry, bench))
    with tempfile.TemporaryDirectory() as folder:
        before, after = module.reloaded(system, bench, Path(folder) / "saved")
    difference = differs(before, after)
    assert not difference, f"the loaded one differs: {difference}"


@law(once=True)
def check_bad_input_is_refused(entry: Entry, bench: Bench) -> None:
    """Each is refused with a UsageError that says what must hold."""
    module = harness(entry)
    if module is None:
        return
    system = build(entry, bench, base_options(entry, bench))
    for what, use in module.bad_inputs(system, bench):
        try:
            use()
        except UsageError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{what} ends in {type(error).__name__} instead of a UsageError: {error}") from error
        else:
            raise AssertionError(f"{what} is not refused")
        assert ": must " in message, f"{what} is refused without saying what must hold: {message}"


def build(entry: Entry, bench: Bench, options: dict[str, Any], *, seed: int = 0) -> Any:
    """The system with its companions."""
    return entry.load()(seed=seed, companions=bench.companions(entry.options), **options)


def run(entry: Entry, bench: Bench, options: dict[str, Any], *, seed: int = 0) -> Any:
    """Use the system on fresh inputs."""
    module = harness(entry)
    assert module is not None
    system = build(entry, bench, options, seed=seed)
    return module.outcome(system, module.subject(system, bench))


def base_options(entry: Entry, bench: Bench) -> dict[str, Any]:
    """The defaults where they work, else the first single option that makes them work (a companion to be named)."""
    key = (entry.path, entry.class_name, bench.family)
    if key not in _BASES:
        _BASES[key] = _usable(entry, bench)
    return dict(_BASES[key])


_BASES: dict[tuple[str, str, str], dict[str, Any]] = {}


def _usable(entry: Entry, bench: Bench) -> dict[str, Any]:
    names = {spec.name for spec in entry.options}
    quick = {name: value for name, value in getattr(harness(entry), "QUICK", {}).items() if name in names}
    try:
        run(entry, bench, quick)
        return quick
    except UsageError as error:
        refusal = error
    for spec in entry.options:
        for value in bench.alternatives(spec)[:CONTEXTS]:
            with contextlib.suppress(UsageError):
                options = {**quick, spec.name: value}
                run(entry, bench, options)
                return options
    raise refusal


def _moves(entry: Entry, bench: Bench, spec: OptionSpec, base: dict[str, Any], tried: dict[str, Any]) -> bool:
    """Whether two values of the option give two outcomes, at ``base`` or with one other option changed."""

    def outcome(options: dict[str, Any]) -> Any:
        key = repr(sorted(options.items()))
        if key not in tried:
            try:
                tried[key] = run(entry, bench, options)
            except UsageError:
                tried[key] = None
        return tried[key]

    values = bench.alternatives(spec)
    for context in _contexts(entry, bench, spec, base):
        first = outcome(context)
        for value in values:
            other = outcome({**context, spec.name: value})
            if first is not None and other is not None and differs(first, other):
                return True
            first = other if first is None else first
    return False


def _contexts(entry: Entry, bench: Bench, spec: OptionSpec, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``base``, then ``base`` with one other option changed: switches and names before numbers."""
    yield base
    others = [other for other in entry.options if other.name != spec.name]
    others.sort(key=lambda other: (other.choices is None and other.type != "bool", other.default is not None))
    for other in others:
        for value in bench.alternatives(other)[:CONTEXTS]:
            yield {**base, other.name: value}


def _forbidden(spec: OptionSpec) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Values that the option must refuse, each with the words that the refusal must have."""
    if spec.type != "Any":
        yield object(), (", got ", spec.help)
    if "bool" not in spec.type and spec.system is None and not spec.type.startswith("Any"):
        yield True, (", got True", spec.help)
    if spec.choices is not None and spec.system is None:
        wrong: Any = "no_such_choice" if isinstance(spec.choices[0], str) else max(spec.choices) + 1
        yield ((wrong,) if spec.type.startswith("tuple") else wrong), ("be one of", repr(wrong))
    number = int if re.match(r"(tuple\[)?int", spec.type) else float
    for bound, sign, step in ((spec.ge, ">=", -1), (spec.gt, ">", 0), (spec.le, "<=", 1), (spec.lt, "<", 0)):
        if bound is not None:
            value = number(bound) + step
            yield ((value,) if spec.type.startswith("tuple") else value), (f"be {sign} {bound}", spec.help)


def _refusal(cls: Any, options: dict[str, Any], what: str) -> str:
    try:
        cls(**options)
    except OptionError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} ends in {type(error).__name__} instead of an OptionError: {error}") from error
    raise AssertionError(f"{what} is accepted")


def _registered(item: str) -> bool:
    prefix, _, name = item.partition(":")
    if prefix not in TRIGGERS:
        return False
    importlib.import_module(TRIGGERS[prefix])
    if prefix == "peft":
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        return name.upper() in {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    if prefix == "quantizer":
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        return name in AUTO_QUANTIZER_MAPPING
    if prefix == "widths":
        from transformers import PreTrainedModel

        return hasattr(PreTrainedModel.post_init, name)
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _test_file(entry: Entry) -> Path:
    return TESTS / entry.kind / f"test_{entry.name}.py"


def _test_names(path: Path) -> list[str]:
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@contextlib.contextmanager
def _generators(state: int) -> Iterator[None]:
    """Global random states of torch, numpy and Python set inside, and as before outside."""
    kept = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    torch.manual_seed(state)
    np.random.seed(state)
    random.seed(state)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _world() -> dict[str, Any]:
    """Global state that a system has no business with."""
    numpy_state: Any = np.random.get_state()
    return {
        "torch generator": torch.get_rng_state(),
        "numpy generator": [numpy_state[1].tolist(), numpy_state[2]],
        "python generator": list(random.getstate()[1]),
        "default dtype": str(torch.get_default_dtype()),
        "gradients enabled": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "working folder": str(Path.cwd()),
    }
