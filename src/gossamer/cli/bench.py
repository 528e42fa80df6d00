"""Measure a speed or size that was promised, contenders in turn in one run, and say whether it is met."""

from __future__ import annotations

import typer

from gossamer.cli._output import Bars, fail_over_budget, json_out, table


def command(
    name: str = typer.Argument("", help="A benchmark, e.g. narrate; without one, they are listed."),
    quick: bool = typer.Option(False, "--quick", help="A small version: shows that it runs, and records nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print every figure as JSON."),
) -> None:
    from gossamer.benchmarks import benchmarks, run

    if not name:
        table(["name", "measures"], list(benchmarks().items()))
        return
    found = run(name, quick=quick, log=Bars().note)
    if as_json:
        json_out(found)
    else:
        for block in found["tables"]:
            typer.echo(block["title"])
            heads = list(dict.fromkeys(key for row in block["rows"] for key in row))
            table(heads, [[_shown(row.get(head, "")) for head in heads] for row in block["rows"]])
        for line in found["targets"]:
            typer.echo(f"{'met' if line['met'] else 'missed'}: {line['text']}: {line['value']} ({line['target']})")
    fail_over_budget(quick or all(line["met"] for line in found["targets"]), f"{name}: a target is missed")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
