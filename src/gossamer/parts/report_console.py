"""The report as tables for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from gossamer.core.report import Report, metric_of, show, show_interval, show_p
from gossamer.parts.report_html import changes, table


def console_tables(report: Report) -> list[Table]:
    """Arms, paired comparisons, steps and budget; those that have no row are left out."""
    made = [_arms(report), _comparisons(report), _steps(report), _budget(report)]
    return [item for item in made if item.row_count]


def _arms(report: Report) -> Table:
    grid = Table(title=_plain(report.title), title_justify="left")
    grid.add_column("")
    for arm in report.arms:
        grid.add_column(_plain(arm.label), justify="right")
    for _, rows in table(report):
        for row in rows:
            cells = [_cell(cell.text, cell.interval, cell.best) for cell in row.cells]
            grid.add_row(_plain(("  " if row.inner else "") + f"{row.label} {row.direction}".rstrip()), *cells)
        grid.add_section()
    return grid


def _comparisons(report: Report) -> Table:
    grid = Table("Metric", "Arm", "against", title="Paired comparisons", title_justify="left")
    for heading in ("Difference", "95 % interval", "p"):
        grid.add_column(heading, justify="right")
    for item in report.comparisons:
        grid.add_row(
            metric_of(item.metric).label,
            _plain(report.arm(item.arm).label),
            _plain(report.arm(item.baseline).label),
            show(item.difference.value, item.difference.unit, signed=True),
            show_interval(item.difference),
            show_p(item.p_value).removeprefix("p = ").removeprefix("p "),
        )
    return grid


def _steps(report: Report) -> Table:
    grid = Table("Step", title="Steps", title_justify="left")
    grid.add_column("Time", justify="right")
    grid.add_column("What it changed")
    for step in report.steps:
        lines = [
            f"{what}: {before} → {after}" if before else f"{what}: {after}" for what, before, after in changes(step)
        ]
        grid.add_row(_plain(step.name), show(step.seconds, "s"), _plain("\n".join([*lines, step.note]).strip()))
    return grid


def _budget(report: Report) -> Table:
    grid = Table("Budget", title="Budget", title_justify="left")
    for heading in ("Bound", "Measured", ""):
        grid.add_column(heading, justify="right")
    for line in report.budget:
        verdict = Text("met", style="green") if line.met else Text("not met", style="bold red")
        grid.add_row(_plain(line.name), show(line.bound, line.unit), show(line.value, line.unit), verdict)
    return grid


def _cell(text: str, interval: str, best: bool) -> Text:
    cell = Text(text, style="bold green" if best else "")
    return cell.append(f"\n{interval}", style="dim not bold") if interval else cell


def _plain(text: str) -> Text:
    # a plain str would have its square brackets read as markup
    return Text(text)
