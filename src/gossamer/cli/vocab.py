"""Vocabularies of narrations: build one, add to it, look into it, have other models propose what it lacks."""

from __future__ import annotations

from typing import Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, help=__doc__)

_MODEL = typer.Option("", "--model", help="The narrator whose text encoder is used; else the sample narrator's.")
_JSON = typer.Option(False, "--json", help="Print it as JSON.")


@app.command()
def build(
    source: str = typer.Argument(help="Narrations: one a line, or .jsonl rows of text, scene, video."),
    out: str = typer.Option(..., "--out", help="The vocabulary to make, e.g. kitchen.vocab."),
    min_count: int = typer.Option(1, "--min-count", help="How often a remainder must be seen to become a postfix."),
    mode: str = typer.Option("consistent", "--mode", help="consistent, or algorithm1: the paper's box to the letter."),
    model: str = _MODEL,
    as_json: bool = _JSON,
) -> None:
    """Encode narrations as prefixes and postfixes, with the scenes they belong to."""
    from pathlib import Path

    from gossamer.applications.narrate.vocabulary import read_narrations
    from gossamer.core.errors import InputError
    from gossamer.parts.narration_index import NarrationIndex

    if not out.endswith(".vocab"):
        raise InputError(f"--out {out}", must="end in .vocab", do=f"write --out {out}.vocab")
    rows = read_narrations(Path(source))
    index = NarrationIndex.build(rows, _encoder(model), mode=mode, min_count=min_count)
    index.save(Path(out))
    _tell(index, out, as_json)


@app.command()
def add(
    vocab: str = typer.Argument(help="A vocabulary."),
    texts: list[str] = typer.Argument(help='Narrations, e.g. "peel a mango".'),  # noqa: B008
    scene: str = typer.Option("", "--scene", help="The scene they belong to; without it they fit every scene."),
    model: str = _MODEL,
) -> None:
    """Add narrations: known at once, nothing is trained."""
    from pathlib import Path

    from gossamer.parts.narration_index import NarrationIndex

    encoder = _encoder(model)
    index = NarrationIndex.load(Path(vocab), encoder)
    new = index.add(texts, encoder, scene=scene or None)
    index.save(Path(vocab))
    where = f" in the scene {scene!r}" if scene else ""
    typer.echo(f"{vocab}: {len(new)} new prefix{'' if len(new) == 1 else 'es'}{where}, {len(index.prefixes)} in all")


@app.command()
def show(vocab: str = typer.Argument(help="A vocabulary."), as_json: bool = _JSON) -> None:
    """What a vocabulary holds, and which text encoder it fits."""
    from pathlib import Path

    from gossamer.parts.narration_index import NarrationIndex

    _tell(NarrationIndex.load(Path(vocab)), vocab, as_json)


@app.command()
def upgrade(
    vocab: str = typer.Argument(help="A vocabulary; it is changed."),
    video: str = typer.Argument(help="A video with clips that are out of vocabulary."),
    describe: str = typer.Option(..., "--describe", help="module:function from a picture (PIL) to one sentence."),
    propose: str = typer.Option(
        ..., "--propose", help="module:function from a prompt to text: actions separated by ;."
    ),
    model: str = _MODEL,
    calls: int = typer.Option(50, "--calls", help="How often to ask at most."),
    as_json: bool = _JSON,
) -> None:
    """Have other models propose what the clips that are out of vocabulary may show, and add it."""
    from pathlib import Path

    from gossamer.applications.narrate.vocabulary import entry
    from gossamer.cli._narration import quiet_libraries
    from gossamer.cli._output import Bars, json_out
    from gossamer.core.errors import InputError
    from gossamer.pipeline.single import system

    if calls < 1:
        raise InputError("--calls", must="be >= 1", got=calls)
    quiet_libraries()
    functions = entry(describe, "describe"), entry(propose, "propose")
    options: dict[str, Any] = {"vocab": vocab} | ({"model": model} if model else {})
    narrate = system("narrate", **options)
    found = narrate.upgrade(video, *functions, calls=calls, note=Bars().note)
    narrate.vocabulary.save(Path(vocab))
    if as_json:
        json_out(found.as_dict())
        return
    for scene, texts in found.added.items():
        typer.echo(f"{scene}: {'; '.join(texts)}")
    typer.echo(f"out of vocabulary: {found.before} of {found.clips} clips before, {found.after} after")


def _encoder(model: str) -> Any:
    from gossamer.cli._narration import quiet_libraries
    from gossamer.pipeline.single import system

    quiet_libraries()
    options: dict[str, Any] = {"model": model} if model else {}
    return system("narrate", **options).encoder


def _tell(index: Any, name: str, as_json: bool) -> None:
    from gossamer.cli._output import json_out, table

    facts = {
        "prefixes": len(index.prefixes),
        "postfixes": len(index.postfixes) - 1,
        "narrations": len(index.narrations()),
        "scenes": len(index.scenes),
        "encoder": index.encoder["name"],
        "fingerprint": index.encoder["fingerprint"],
        "threshold": "of the model" if index.threshold is None else index.threshold,
    }
    if as_json:
        lists = {"prefixes": index.prefixes, "postfixes": index.postfixes[1:], "scenes": index.scenes}
        json_out({"vocabulary": name, "counts": facts, **lists})
        return
    typer.echo(name)
    table(["", ""], [[key, value] for key, value in facts.items()])
    for what, texts in (("scenes", index.scenes), ("postfixes", index.postfixes[1:]), ("prefixes", index.prefixes)):
        more = f" ... {len(texts) - 12} more (--json lists all)" if len(texts) > 12 else ""
        typer.echo(f"{what}: {'; '.join(texts[:12]) or 'none'}{more}")
