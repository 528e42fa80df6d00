"""Stages of a server: at most one decoding system, and guards, switched on at its start and off by a request.

    NAME[:key=value,...]     proxy_tuning:expert=runs/small,anti_expert=gemma-3-270m     clover:path=runs/drafter

A system that learned something is loaded from the folder ``path`` that its ``save`` wrote, or taken from the parts of
the served run; its other options are those that it was saved with, of which only those that change no output may be
given here. It is refused where it was fitted for another model. An option that names a model loads that model.

A guard judges what a prompt holds of others than the assistant: the text of a completion, each message of a chat.
"""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.options import check_options
from gossamer.core.recipe import parse_value
from gossamer.kinds.base import FittedSystem
from gossamer.kinds.decoding import Decoding, DrafterDecoding, ProcessorDecoding
from gossamer.kinds.guards import REFUSAL, Guard, Verdict
from gossamer.serving.sequences import Ask, Tally

_VERDICTS = 512  # that are remembered, as a chat sends its messages again with each turn
PATH = "path"


class Stages:
    """The stages that a server has. ``decoding``: a processor or a drafter."""

    def __init__(self, decoding: Decoding | None = None, guards: Sequence[Guard] = ()) -> None:
        if decoding is not None and not isinstance(decoding, ProcessorDecoding | DrafterDecoding):
            raise InputError(f"stage {decoding.name}", must="move scores or guess tokens", got="a loop of its own")
        self.decoding, self.guards = decoding, tuple(guards)
        self._verdicts: collections.OrderedDict[tuple[str, bytes], Verdict] = collections.OrderedDict()

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in (*self.guards, *([self.decoding] if self.decoding else []))]

    def on(self, switches: Mapping[str, bool], where: str) -> frozenset[str]:
        """The names that are on for a request; :class:`OptionError` for a stage that is not there."""
        for name in switches:
            if name not in self.names:
                raise OptionError(f"{where}.{name}", must="name a stage of this server", do=_choose(name, self.names))
        return frozenset(name for name in self.names if switches.get(name, True))

    def judges(self, ask: Ask) -> bool:
        """Whether a guard that is on has something to judge."""
        return bool(ask.judged) and any(guard.name in ask.stages for guard in self.guards)

    def judge(self, ask: Ask, tally: Tally) -> tuple[str, int] | None:
        """The refusal and its number of tokens where a guard that is on flags a text of the prompt."""
        refusal = None
        for guard in self.guards:
            if guard.name not in ask.stages:
                continue
            began = time.perf_counter()
            verdicts = [self._verdict(guard, text) for text in ask.judged if text.strip()]
            tally.spend(guard.name, time.perf_counter() - began)
            worst = max(verdicts, key=lambda verdict: verdict.score, default=None)
            if worst is not None:
                tally.stages[guard.name] |= {"label": worst.label, "score": worst.score}
                if worst.flagged:
                    refusal = refusal or (REFUSAL, len(guard.refusal_tokens()))
        return refusal

    def _verdict(self, guard: Guard, text: str) -> Verdict:
        key = (guard.name, hashlib.sha256(text.encode()).digest())
        if key not in self._verdicts:
            self._verdicts[key] = guard.judge(text)
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > _VERDICTS:
            self._verdicts.popitem(last=False)
        return self._verdicts[key]


def load_stages(texts: Sequence[str], bundle: Bundle, load: Callable[[str], Bundle]) -> Stages:
    """The stages that ``--stage`` lines name, for the model of ``bundle``; ``load`` opens models that they name."""
    decoding: list[Decoding] = []
    guards: list[Guard] = []
    for text in texts:
        name, options = parse_stage(text)
        system = _loaded(name, options, bundle, load)
        if any(system.name == other.name for other in (*decoding, *guards)):
            raise OptionError(f"--stage {name}", must="be given once", got="twice")
        if isinstance(system, Guard):
            guards.append(system)
        else:
            decoding.append(system)
    if len(decoding) > 1:
        names = " and ".join(system.name for system in decoding)
        raise OptionError("--stage", must="name at most one decoding system", got=names, do="leave one out")
    stages = Stages(decoding[0] if decoding else None, guards)
    if stages.decoding is not None:
        # refuses a model that does not fit now and not at the first request
        stages.decoding.check(bundle.model, tokenizer=bundle.processor)
    return stages


def parse_stage(text: str) -> tuple[str, dict[str, Any]]:
    """``"clover:path=drafter,switch_off=false"`` to a name and options, values read as YAML."""
    name, _, rest = text.partition(":")
    options = {}
    for setting in filter(None, rest.split(",")):
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise OptionError(f"--stage {text}", must="be NAME[:key=value,...]", got=repr(setting))
        if key in options:
            raise OptionError(f"--stage {text}", must="give each key once", got=f"{key} twice")
        options[key] = value if key == PATH else parse_value(value)
    return name, options


def _loaded(name: str, options: dict[str, Any], bundle: Bundle, load: Callable[[str], Bundle]) -> Any:
    entry = registry.find(name, kind="decoding|guards")
    system_class: Any = entry.load()
    where = f"--stage {name}"
    if not issubclass(system_class, FittedSystem):
        named = {spec.name for spec in entry.options if spec.companion}
        settings = check_options(options, entry.options, where)
        companions = {str(value): load(str(value)) for key, value in settings.items() if key in named and value}
        return system_class(system_class.config_class.build(settings, where), companions=companions)
    path = options.pop(PATH, None)
    speed = [spec for spec in entry.options if spec.effect == "speed"]
    for key in options:
        if key not in {spec.name for spec in speed}:
            must = "be path, or an option that changes no output: what it learned goes with the rest"
            raise OptionError(f"{where}.{key}", must=must, do=_choose(key, [PATH, *(spec.name for spec in speed)]))
    if path is not None:
        system = system_class.load(Path(path), bundle)
    elif name in bundle.parts:
        system = bundle.parts[name]
    else:
        must = "say where its state lies"
        raise OptionError(where, must=must, got="no path", do=f"write {name}:path=FOLDER, a folder that save() wrote")
    if options:
        system.config = system_class.config_class.build({**system.config.as_dict(), **options}, where)
    return system


def _choose(name: str, names: Sequence[str]) -> str:
    return did_you_mean(name, names) if names else "start the server with --stage"
