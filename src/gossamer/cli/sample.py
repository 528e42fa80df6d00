"""Render a video of the sample world, with its true script beside it: something to try `narrate` on."""

from __future__ import annotations

import typer


def command(
    video: str = typer.Argument(help="The file to write: .mp4, .webm or .mkv."),
    minutes: float = typer.Option(0.5, "--minutes", help="How long."),
    height: int = typer.Option(360, "--height", help="Pixels; the width is 16/9 of it."),
    style: str = typer.Option("flat", "--style", help="flat, textured or photo; the sample narrator knows flat."),
    scene: list[str] = typer.Option(["kitchen"], "--scene", help="The place; several follow one another."),  # noqa: B008
    seed: int = typer.Option(0, "--seed", help="Another script."),
    as_json: bool = typer.Option(False, "--json", help="Print the script as JSON."),
) -> None:
    from pathlib import Path

    from gossamer.cli._output import json_out
    from gossamer.core.paths import write_json
    from gossamer.hub.worlds.events import sample_video

    size = (height // 2 * 2, height * 16 // 9 // 2 * 2)
    script = sample_video(video, minutes, size=size, style=style, scenes=scene, seed=seed)
    truth = Path(video).with_suffix(".json")
    write_json(truth, script)
    if as_json:
        json_out(script)
    else:
        typer.echo(f"{video}: {len(script)} clips of {len({row['scene'] for row in script})} places; script in {truth}")
