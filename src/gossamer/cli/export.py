"""Write a model or run as gguf, onnx, safetensors, peft or a whole package, and prove that it is the same."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    to: str = typer.Option(..., "--to", help="gguf, onnx, safetensors; peft: the adapter; package: everything."),
    out: str = typer.Option(..., "--out", help="A new file for gguf, else a new folder."),
    kind: str = typer.Option("", "--type", help="gguf: f16, q8_0, q4_0; safetensors: bf16, f16, f32."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    import dataclasses
    from pathlib import Path

    from gossamer.cli._models import load_any
    from gossamer.cli._output import json_out
    from gossamer.pipeline.exporting import check_export, export
    from gossamer.pipeline.packages import export_package

    check_export(Path(out), to, kind or None)
    if to == "package" and Path(model).is_dir():
        # of a run more is known than of its result
        told = export_package(Path(model), Path(out))
        json_out(told) if as_json else typer.echo(f"wrote {out}: {told['bytes'] / 1e6:,.1f} MB, {told['round_trip']}")
        return
    done = export(load_any(model), Path(out), to, kind or None)
    if as_json:
        json_out(dataclasses.asdict(done))
        return
    form = " ".join(filter(None, (done.format, done.type)))
    typer.echo(f"wrote {done.path}: {form}, {done.bytes / 1e6:,.1f} MB")
    for name, value in done.proof.items():
        typer.echo(f"  {name}: {value}")
