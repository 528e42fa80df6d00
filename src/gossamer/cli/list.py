"""List the systems with what they claim and what was shown of it."""

from __future__ import annotations

import typer

from gossamer.cli._output import json_out, table


def command(
    kind: str = typer.Option("", "--kind", help="One kind only, e.g. adapters."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
    builtin: bool = typer.Option(False, "--builtin", help="Also the baselines and tools without a paper."),
) -> None:
    from gossamer.core.catalogue import rows

    found = rows(kind=kind or None, builtin=builtin)
    if as_json:
        json_out(found)
    else:
        cells = [[row["name"], row["kind"], row["title"], row["claim"], row["evidence"]["status"]] for row in found]
        table(["name", "kind", "title", "claim", "evidence"], cells)
