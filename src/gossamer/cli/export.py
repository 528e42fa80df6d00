"""Export the adapter of a run as a plain LoRA that PEFT loads without Gossamer."""

from __future__ import annotations

import typer


def command(
    run: str = typer.Argument(help="The folder of a run whose result has an adapter attached."),
    out: str = typer.Option("lora", "--out", help="A new folder for the LoRA checkpoint."),
) -> None:
    from pathlib import Path

    from gossamer.core.errors import InputError
    from gossamer.pipeline.stage import load_bundle

    folder = Path(run) / "result" if (Path(run) / "result").exists() else Path(run)
    bundle = load_bundle(folder)
    if not bundle.adapters:
        raise InputError(f"export {run}", must="be a run whose result has an adapter", do="run without the merge step")
    bundle.adapters[-1].export_lora(bundle.model, Path(out))
    typer.echo(f"wrote {out}: load it with peft.PeftModel.from_pretrained(base, {out!r})")
