"""Run the experiment behind a system's claim and record what it showed."""

from __future__ import annotations

import typer

from gossamer.cli._output import Bars, fail_over_budget, json_out


def command(
    name: str = typer.Argument(help="A system, e.g. mos."),
    quick: bool = typer.Option(False, "--quick", help="The same arms at tiny size: clears a recheck only."),
    as_json: bool = typer.Option(False, "--json", help="Print the evidence as JSON."),
) -> None:
    from gossamer.experiments.runner import prove

    evidence = prove(name, quick=quick, log=Bars().note)
    if as_json:
        json_out(evidence)
    else:
        for line in evidence["must_see"]:
            typer.echo(f"{'shown' if line['shown'] else 'not shown'}: {line['text']} ({line['figures']})")
        for note in evidence["notes"]:
            typer.echo(f"note: {note}")
        low, high = ("?" if bound is None else f"{bound:.4g}" for bound in evidence["interval"])
        effect = f"{evidence['effect']:.4g} [{low}, {high}] {evidence['unit']}"
        typer.echo(f"{evidence['result']} against {evidence['baseline']}: {effect}")
    fail_over_budget(evidence["shown"] or quick, f"{name}: the claim is not shown")
