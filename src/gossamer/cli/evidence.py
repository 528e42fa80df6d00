"""List what was shown of each claim, when and where."""

from __future__ import annotations

import typer

from gossamer.cli._output import json_out, table


def command(
    stale: bool = typer.Option(False, "--stale", help="Only what has to be proved or rechecked."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    from gossamer.core.catalogue import rows

    found = [
        {"name": row["name"], "claim": row["claim"], **row["evidence"]}
        for row in rows()
        if not stale or row["evidence"]["status"] in ("stale", "recheck", "none")
    ]
    if as_json:
        json_out(found)
    else:
        heads = ["name", "status", "date", "device", "claim"]
        table(heads, [[row[head] or "" for head in heads] for row in found])
