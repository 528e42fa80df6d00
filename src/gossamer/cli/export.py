"""Write a model, or the result of a run, as gguf, onnx, safetensors or peft, and prove that it is the same."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    to: str = typer.Option(..., "--to", help="gguf, onnx, safetensors, or peft: the attached adapter."),
    out: str = typer.Option(..., "--out", help="A new file for gguf, else a new folder."),
    kind: str = typer.Option("", "--type", help="gguf: f16, q8_0, q4_0; safetensors: bf16, f16, f32."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    import dataclasses
    from pathlib import Path

    from gossamer.cli._models import load_any
    from gossamer.cli._output import json_out
    from gossamer.pipeline.exporting import check_export, export

    check_export(Path(out), to, kind or None)
    done = export(load_any(model), Path(out), to, kind or None)
    if as_json:
        json_out(dataclasses.asdict(done))
        return
    typer.echo(f"wrote {done.path}: {done.format} {done.type or ''}, {done.bytes / 1e6:,.1f} MB")
    for name, value in done.proof.items():
        typer.echo(f"  {name}: {value}")
