"""Narrate a video: a timed log of what happens, clip by clip, as text, JSON, subtitles or one HTML page.

Without --model and --vocab the sample narrator is used. It knows the rendered sample world only; what it does not know
it marks as out of vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any

import typer


def command(
    video: str = typer.Argument(help="A video file: mp4, webm, mkv, mov."),
    model: str = typer.Option("", "--model", help="A trained narrator: folder, run or name."),
    vocab: str = typer.Option("", "--vocab", help="A vocabulary that `gossamer vocab` made."),
    query: str = typer.Option("", "--query", help='What to ask of each clip, e.g. "what happens next?".'),
    scene: str = typer.Option("", "--scene", help="The scene, where it is known; else it is found."),
    start: float = typer.Option(0.0, "--start", help="First second."),
    end: float | None = typer.Option(None, "--end", help="Last second; the video's end where not given."),
    clip: float = typer.Option(1.0, "--clip", help="Seconds of a clip."),
    fps: float = typer.Option(2.0, "--fps", help="Frames a second that are looked at."),
    settings: list[str] = typer.Option([], "--set", help="A further option: top_scenes=5, threshold=0.4 ..."),  # noqa: B008
    as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON."),
    srt: str = typer.Option("", "--srt", help="Write subtitles to this file."),
    html: str = typer.Option("", "--html", help="Write a page with key frames and search to this file."),
    out: str = typer.Option("", "--out", help="Write narration.json, .srt and .html into this folder."),
) -> None:
    from pathlib import Path

    from gossamer.cli._narration import quiet_libraries, shown_rows
    from gossamer.cli._output import json_out, parse_settings
    from gossamer.core.paths import write_json
    from gossamer.pipeline.single import system

    quiet_libraries()
    given = {"model": model, "vocab": vocab, "query": query, "scene": scene}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    options |= {"start": start, "end": end, "clip": clip, "fps": fps}
    application = system("narrate", **options | parse_settings(settings))
    with shown_rows(as_json) as (row, progress):
        found = application.apply(video, on_row=row, on_progress=progress)
    if out:
        folder = Path(out)
        write_json(folder / "narration.json", found.as_dict())
        srt, html = srt or str(folder / "narration.srt"), html or str(folder / "narration.html")
    if srt:
        found.srt(srt)
    if html:
        found.html(html)
    if as_json:
        json_out(found.as_dict())
    for text in filter(None, (*found.notes, found.advice)):
        typer.echo(text, err=True)
    if found.stopped is not None:
        sys.exit(1)
