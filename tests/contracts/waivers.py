"""Laws that a system is excused from, each with the reason. A waiver whose law holds fails the run."""

from __future__ import annotations

WAIVERS: dict[tuple[str, str], str] = {}
