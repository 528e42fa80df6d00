"""What all systems share: options, a seed, companions, checks around the verb, and fitted state."""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from gossamer.core.errors import InputError
from gossamer.core.options import Config
from gossamer.core.paths import atomic_dir, write_json


class System(abc.ABC):
    """Base of every kind's base class.

    ``System(rank=4)`` or ``System(config)``. ``seed`` rules everything random that the system does; ``companions`` are
    further models by the name that the config gives them (teacher, expert ...).
    """

    config_class: ClassVar[type[Config]] = Config
    verb: ClassVar[str] = ""
    config: Any  # an instance of config_class: systems see its fields

    def __init__(
        self,
        config: Config | None = None,
        *,
        seed: int = 0,
        companions: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        assert config is None or not options, "give a config or options, not both"
        self.config = config if config is not None else self.config_class.build(options, self.name)
        self.seed = seed
        self.companions = dict(companions or {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        verb = cls.__dict__.get(cls.verb)
        if verb is not None and not getattr(verb, "__isabstractmethod__", False):
            setattr(cls, cls.verb, _checked(verb))

    @property
    def name(self) -> str:
        """The registry name: the stem of the file or folder that holds the class."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the verb cannot work on; runs before it."""

    def finish(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Complete or verify what the verb returned; runs after it."""
        return result

    def companion(self, name: str) -> Any:
        """The further model that the recipe lists as ``name`` under ``models:``."""
        if name not in self.companions:
            given = sorted(self.companions) or "none"
            raise InputError(
                f"{self.name}: companion {name!r}",
                must="be given",
                got=given,
                do=f"list it under `models:` in the recipe, or pass companions={{{name!r}: model}}",
            )
        return self.companions[name]


def _checked(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def run(self: System, *args: Any, **kwargs: Any) -> Any:
        self.check(*args, **kwargs)
        return self.finish(verb(self, *args, **kwargs), *args, **kwargs)

    return run


class State:
    """What a system learned: named tensors and plain JSON values, saved with the fingerprint of the model it fits."""

    def __init__(self, tensors: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> None:
        self.tensors = dict(tensors)
        self.values = dict(values or {})


class FittedSystem(System):
    """A system with ``fit(bundle, data) -> State``; the state is saved, loaded and refused on another model here."""

    state: State | None = None
    fingerprint: str = ""

    def fit(self, bundle: Any, data: Any) -> State:
        """Learn from ``data`` (rows) for ``bundle.model``; subclasses implement :meth:`learn`."""
        from gossamer.parts.fingerprint import fingerprint

        self.state = self.learn(bundle, data)
        self.fingerprint = fingerprint(bundle.model)
        self.ready(bundle)
        return self.state

    @abc.abstractmethod
    def learn(self, bundle: Any, data: Any) -> State:
        """The learning itself."""

    def ready(self, bundle: Any) -> None:
        """Set up for use from ``self.state`` (after fit and after load)."""

    def save(self, folder: Path) -> None:
        """Write the state as safetensors and JSON."""
        from safetensors.torch import save_file

        if self.state is None:
            raise InputError(f"{self.name}: state", must="be fitted before it is saved", do="call fit(bundle, data)")
        with atomic_dir(Path(folder)) as path:
            save_file({k: v.contiguous() for k, v in self.state.tensors.items()}, path / "state.safetensors")
            write_json(
                path / "state.json",
                {
                    "system": self.name,
                    "options": self.config.as_dict(),
                    "seed": self.seed,
                    "fingerprint": self.fingerprint,
                    "values": self.state.values,
                },
            )

    @classmethod
    def load(cls, folder: Path, bundle: Any, companions: Mapping[str, Any] | None = None) -> Self:
        """Read a saved state; :class:`InputError` when it was fitted for another model."""
        from safetensors.torch import load_file

        from gossamer.parts.fingerprint import fingerprint

        head = Path(folder) / "state.json"
        if not head.exists():
            raise InputError(
                str(folder), must="hold state.json and state.safetensors", do="give a folder that save() wrote"
            )
        meta = json.loads(head.read_text(encoding="utf-8"))
        system = cls(cls.config_class.build(meta["options"], str(head)), seed=meta["seed"], companions=companions)
        if meta["fingerprint"] != fingerprint(bundle.model):
            raise InputError(
                f"{folder}: state of {meta['system']}",
                must=f"fit this model (fingerprint {fingerprint(bundle.model)})",
                got=meta["fingerprint"],
                do="fit it again on this model",
            )
        system.state = State(load_file(Path(folder) / "state.safetensors"), meta["values"])
        system.fingerprint = meta["fingerprint"]
        system.ready(bundle)
        return system
