"""What goes into a vocabulary: narration files, and what other models propose for clips that it does not know.

    clip out of vocabulary -> describe(key frame) = one sentence -> list_actions(prompt) = "verb noun; verb noun; ..."
    -> parsed, text-encoded, added under that scene -> the clips that are left are searched again

``describe`` is any callable from a PIL image to text, ``list_actions`` any from text to text. No weight changes. Clips
that the additions made known are not asked about, so that the calls are far fewer than the clips (VLog, arXiv
2503.09402, section 3.4).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gossamer.core.errors import InputError
from gossamer.parts.narration import propose
from gossamer.parts.narration_index import NarrationIndex, TextEncoder
from gossamer.parts.narration_pairs import clean


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """``added`` narrations by scene; ``calls`` of describe; clips out of vocabulary ``before`` and ``after``."""

    added: dict[str, list[str]]
    calls: int
    clips: int
    before: int
    after: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def upgrade(
    index: NarrationIndex,
    encoder: TextEncoder,
    clips: int,
    unknown: Sequence[int],
    picture: Callable[[int], Image.Image],
    still_unknown: Callable[[Sequence[int]], list[int]],
    describe: Callable[[Any], str],
    list_actions: Callable[[str], str],
    *,
    calls: int,
    note: Callable[[str], None],
) -> Upgrade:
    """Add to ``index`` what is proposed for the clips ``unknown`` of a video of ``clips`` clips.

    ``picture`` gives the key frame of a clip, ``still_unknown`` those of some clips that the index as it is does not
    know. An answer without actions in it is noted and counts as a call.
    """
    left, added, asked = list(unknown), dict[str, list[str]](), 0
    while left and asked < calls:
        clip, left, asked = left[0], left[1:], asked + 1
        try:
            scene, actions = propose(picture(clip), describe, list_actions)
        except InputError as error:
            note(f"clip {clip}: {error}")
            continue
        # of every video too: the scene query of a foreign video is no safer than its narrations
        new = index.add(actions, encoder, scene=scene)
        index.add(actions, encoder)
        if new:
            added.setdefault(scene, []).extend(new)
            left = still_unknown(left)
        note(f"clip {clip}: {scene}: {'; '.join(new) or 'nothing new'}")
    return Upgrade(added, asked, clips, len(unknown), len(still_unknown(unknown)))


def read_narrations(path: Path) -> list[dict[str, str]]:
    """Rows {"text", "scene"?, "video"?} of a text file (one narration a line) or of JSON lines.

    Tags of egocentric annotations are taken out; empty lines are left out. InputError names the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        must, do = "be a text file in UTF-8", "give narrations one a line, or .jsonl rows"
        raise InputError(f"narrations {path}", must=must, got=str(error), do=do) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _json_row(line, f"{path}: line {number}") if path.suffix == ".jsonl" else {"text": line}
            rows.append(row | {"text": clean(row["text"])})
    rows = [row for row in rows if row["text"]]
    if not rows:
        raise InputError(f"narrations {path}", must="hold at least one narration", got="none")
    return rows


def entry(name: str, what: str) -> Callable[[Any], str]:
    """The function that ``module:function`` names. InputError where there is none."""
    module, sign, function = name.partition(":")
    do = f"write --{what} module:function, of a module that Python can import"
    if not sign:
        raise InputError(f"--{what} {name}", must="be module:function", do=do)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--{what} {name}", must="be there to import", got=str(error), do=do) from error
    if not callable(found):
        raise InputError(f"--{what} {name}", must="be a function", got=type(found).__name__, do=do)
    return found


def _json_row(line: str, where: str) -> dict[str, str]:
    do = 'write {"text": "cut the potato", "scene": "kitchen"}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(where, must="be a JSON object", got=str(error), do=do) from error
    fields = ("text", "scene", "video")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(where, must="have a text", got=line[:60], do=do)
    wrong = [name for name in fields if not isinstance(row.get(name, ""), str)]
    if wrong:
        raise InputError(f"{where}, {wrong[0]}", must="be text", got=repr(row[wrong[0]]), do=do)
    return {name: row[name] for name in fields if row.get(name)}
