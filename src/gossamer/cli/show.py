"""Show one system: what it does, its options, what was shown of its claim."""

from __future__ import annotations

import typer

from gossamer.cli._output import json_out, table


def command(
    name: str = typer.Argument(help="A system or a step, e.g. mos."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    import dataclasses

    from gossamer.core import registry
    from gossamer.core.evidence import read_evidence, status

    entry = registry.steps().get(name) or registry.find(name)
    evidence = status(entry)
    if as_json:
        json_out({**dataclasses.asdict(entry), "evidence": evidence})
        return
    card = entry.card
    source = f", arXiv {card.paper}" if card.paper else ""
    typer.echo(f"{entry.name} ({entry.kind}): {card.title}{source}\n\n{entry.doc}\n")
    typer.echo(f"Claim: {card.claim}")
    when = f" ({evidence['date']}, {evidence['device']})" if evidence["date"] else ""
    typer.echo(f"Evidence: {evidence['status']}{when}")
    for line in (read_evidence(entry) or {}).get("must_see", []):
        typer.echo(f"  {'shown' if line['shown'] else 'not shown'}: {line['text']} ({line['figures']})")
    if card.limits:
        typer.echo(f"Limits: {card.limits}")
    if entry.options:
        table(["option", "type", "default", "meaning"], [[s.name, s.type, s.default, s.help] for s in entry.options])
