"""What flows through the steps of a recipe: a model, its processor, fitted parts, and how they came to be."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Bundle:
    """``model`` and ``processor`` are ordinary Hugging Face objects.

    ``parts`` holds fitted systems by name (a guard, a drafter, an index); ``adapters`` the attached adapter systems in
    order; ``lineage`` one record a step with its resolved options, versions and hashes.
    """

    model: Any
    processor: Any
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: list[Any] = dataclasses.field(default_factory=list)
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)
