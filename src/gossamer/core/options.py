"""Options: one declaration gives the default, help, type and bounds, at run time and from the syntax tree alone.

    class MoSConfig(Config):
        rank: int = option(8, "rank that each layer uses", ge=1)

``Config`` subclasses become frozen, keyword-only dataclasses whose values are checked on construction.
The same :class:`OptionSpec` is built by :mod:`gossamer.core.card` from the source text, so that a recipe is checked
without importing the system.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from gossamer.core.errors import OptionError, did_you_mean

EFFECTS = ("output", "report", "speed", "memory")
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """One option of a system or step. ``type`` is its annotation as written, e.g. ``int | None``."""

    name: str
    type: str
    default: Any
    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] | None = None
    effect: str = "output"  # what it changes; an "output" option must change the output
    system: str | None = None  # the value names a system of this kind: "sft" or {"dpo": {"beta": 0.1}}
    companion: bool = False  # the value names a model under the recipe's `models:`
    names: str | None = None  # beside `choices`, systems of this kind; in a mapping, those with their options

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` in its stored form (lists become tuples), or raise :class:`OptionError`."""
        here = f"{where}.{self.name}"
        if self.system is not None:
            return self._check_reference(value, here)
        alternatives = [part.strip() for part in _split_union(self.type)]
        for kind in alternatives:
            fits, stored = _fit(kind, value)
            if fits:
                self._check_bounds(stored, here)
                if self.names is not None and isinstance(stored, dict):
                    self._check_named_options(stored, here)
                return stored
        raise OptionError(here, must=f"be {self.type}", got=f"{value!r} ({type(value).__name__})", do=self.help)

    def _check_reference(self, value: Any, here: str) -> Any:
        single = isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict)
        if not (isinstance(value, str) or single or (value is None and self.default is None)):
            raise OptionError(here, must="be a name or {name: {options}}", got=repr(value), do=self.help)
        return value

    def _known(self) -> list[Any] | None:
        """The values there are, where they are listed."""
        if self.choices is None or self.names is None:
            return None if self.choices is None else list(self.choices)
        from gossamer.core import registry

        return [*self.choices, *(entry.name for entry in registry.systems().values() if entry.kind == self.names)]

    def _check_named_options(self, value: dict[str, Any], here: str) -> None:
        from gossamer.core import registry

        for name, options in value.items():
            if not isinstance(options, dict):
                raise OptionError(f"{here}.{name}", must="be a mapping of options", got=repr(options), do=self.help)
            check_options(options, registry.find(name, kind=self.names).options, f"{here}.{name}")

    def _check_bounds(self, value: Any, here: str) -> None:
        values = value if isinstance(value, tuple) else (value,)
        for item in values:
            known = self._known()
            if known is not None and item is not None and item not in known:
                hint = did_you_mean(str(item), [str(choice) for choice in known])
                raise OptionError(here, must=f"be one of {known}", got=repr(item), do=hint)
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                continue
            for bound, sign, holds in (
                (self.ge, ">=", lambda a, b: a >= b),
                (self.gt, ">", lambda a, b: a > b),
                (self.le, "<=", lambda a, b: a <= b),
                (self.lt, "<", lambda a, b: a < b),
            ):
                if bound is not None and not holds(item, bound):
                    raise OptionError(here, must=f"be {sign} {bound}", got=repr(item), do=self.help)


def _split_union(annotation: str) -> list[str]:
    """Split ``int | tuple[str, ...] | None`` at the bars outside brackets."""
    parts, depth, current = [], 0, ""
    for char in annotation:
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current]


def _fit(kind: str, value: Any) -> tuple[bool, Any]:
    if kind == "None":
        return value is None, None
    if kind in _SCALARS:
        right = isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))
        return right, float(value) if right and kind == "float" else value
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix("]").split(",")[0].strip()
        if not isinstance(value, (list, tuple)):
            return False, value
        pairs = [_fit(inner, item) for item in value]
        return all(fits for fits, _ in pairs), tuple(stored for _, stored in pairs)
    if kind.startswith("dict["):
        inner = kind.removeprefix("dict[").removesuffix("]").split(",")[1].strip()
        right = isinstance(value, dict) and all(isinstance(k, str) and _fit(inner, v)[0] for k, v in value.items())
        return right, value
    if kind == "Any":
        return True, value
    raise AssertionError(f"unsupported option type {kind!r}")


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    effect: str = "output",
    system: str | None = None,
    companion: bool = False,
    names: str | None = None,
) -> Any:
    """Declare an option of a :class:`Config`. All arguments must be literals: they are read without importing."""
    assert effect in EFFECTS, effect
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    metadata |= {"effect": effect, "system": system, "companion": companion, "names": names}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Base of every configuration: frozen, keyword-only, checked. Subclasses declare fields with :func:`option`."""

    specs: ClassVar[tuple[OptionSpec, ...]] = ()

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.specs = tuple(_spec(field) for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def build(cls, options: dict[str, Any], where: str) -> Any:
        """Construct from a mapping; unknown keys are refused with a suggestion."""
        return cls(**check_options(options, cls.specs, where))

    def __post_init__(self) -> None:
        where = getattr(type(self), "where", type(self).__name__)
        for spec in self.specs:
            object.__setattr__(self, spec.name, spec.check(getattr(self, spec.name), where))

    def as_dict(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in self.specs}


def check_options(options: dict[str, Any], specs: tuple[OptionSpec, ...], where: str) -> dict[str, Any]:
    """Check ``options`` against ``specs``; returns the given ones in stored form (no defaults added)."""
    known = {spec.name: spec for spec in specs}
    for name in options:
        if name not in known:
            raise OptionError(f"{where}.{name}", must="be an option it has", do=did_you_mean(name, known))
    return {name: known[name].check(value, where) for name, value in options.items()}


def _spec(field: dataclasses.Field[Any]) -> OptionSpec:
    default = field.default_factory() if callable(field.default_factory) else field.default
    type_ = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return OptionSpec(name=field.name, type=type_, default=default, **field.metadata)
