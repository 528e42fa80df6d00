"""Export the adapter of a run as a plain LoRA that PEFT loads without Gossamer."""

from __future__ import annotations

import typer

_TEXTS = ("The function returns the number of items.", "def area(width, height):\n    return width * height\n")
_BOUND = 0.05  # log-probability, for models in bfloat16


def command(
    run: str = typer.Argument(help="The folder of a run whose result has an adapter attached."),
    out: str = typer.Option("lora", "--out", help="A new folder for the LoRA checkpoint."),
) -> None:
    from pathlib import Path

    from peft import PeftModel

    from gossamer.core.errors import InputError
    from gossamer.parts.roundtrip import probe, prove_same
    from gossamer.pipeline.stage import load_bundle

    folder = Path(run) / "result" if (Path(run) / "result").exists() else Path(run)
    bundle = load_bundle(folder)
    if not bundle.adapters:
        raise InputError(f"export {run}", must="be a run whose result has an adapter", do="run without the merge step")
    adapter = bundle.adapters[-1]
    before = probe(bundle.model, bundle.processor, _TEXTS)
    adapter.export_lora(bundle.model, Path(out))
    again = PeftModel.from_pretrained(adapter.detach(bundle.model), out)
    after = probe(again, bundle.processor, _TEXTS, like=before)
    prove_same(before, after, what=f"export {out}", largest=_BOUND, weights=False)
    typer.echo(f"wrote {out}: load it with peft.PeftModel.from_pretrained(base, {out!r})")
