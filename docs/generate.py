"""Writes what the documentation says of the systems: their pages, the catalogue, and the marked blocks of other files.

    python docs/generate.py

Everything comes from cards, docstrings, options and evidence, read without importing any system. A marked block stands
between ``<!-- name -->`` and ``<!-- /name -->`` (``# name`` and ``# /name`` in mkdocs.yml) and is replaced whole.
"""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.core.evidence import read_evidence, status
from gossamer.core.facts import FACTS
from gossamer.core.kinds import KINDS
from gossamer.core.options import OptionSpec
from gossamer.core.recipe import BudgetConfig, DataConfig
from gossamer.core.report import Report, Value, metric_of, show, show_interval, show_p

ROOT = Path(__file__).resolve().parent.parent
DEMO = registry.PACKAGE / "evidence" / "bench" / "quickstart.json"
SPEED = registry.PACKAGE / "evidence" / "bench" / "decode.json"
SERVING = registry.PACKAGE / "evidence" / "bench" / "serve.json"
MADE = "<!-- written by docs/generate.py from the source: make docs -->"
STATES = {
    "shown": "shown",
    "not_shown": "not shown",
    "stale": "to be proved again: the code changed",
    "recheck": "to be rechecked: shared parts changed",
    "none": "not measured yet",
}
# how a system of a kind is called, where the verb of its row is not the call that a user writes
CALLS = {"decoding": "generate(model, tokenizer, prompts)", "guards": "fit(bundle, rows)"}


def generated() -> dict[Path, str]:
    """Every file that is made here, or holds a block that is, with its whole text."""
    entries = [entry for entry in registry.systems().values() if entry.origin == "gossamer"]
    folder = ROOT / "docs" / "systems"
    files = {folder / f"{entry.name}.md": page(entry) for entry in entries}
    files[folder / "index.md"] = index(entries)
    blocks = {
        "demo": demo(),
        "speed": speed(),
        "serving": serving(),
        "catalogue": catalogue([entry for entry in entries if not entry.card.builtin]),
        "steps": "\n\n".join(step(entry) for entry in registry.steps().values()),
        "data": options(DataConfig.specs),
        "budget": options(BudgetConfig.specs),
    }
    for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]:
        files[path] = filled(path.read_text(encoding="utf-8"), blocks, "<!-- {} -->", "<!-- /{} -->", "\n\n")
    settings = ROOT / "mkdocs.yml"
    listed = {"nav": "\n".join(nav(entries))}
    files[settings] = filled(settings.read_text(encoding="utf-8"), listed, "# {}", "# /{}", "\n")
    return files


def superfluous(files: Mapping[Path, str]) -> list[Path]:
    """Pages of systems that are no more."""
    return [path for path in (ROOT / "docs" / "systems").glob("*.md") if path not in files]


def filled(text: str, blocks: Mapping[str, str], left: str, right: str, gap: str) -> str:
    """``text`` with each block that it marks put in; the end mark keeps its indentation."""
    for name, block in blocks.items():
        marks = re.escape(left.format(name)) + r"\n(?:.*\n)*?([ ]*)" + re.escape(right.format(name)) + r"$"
        if match := re.search(marks, text, flags=re.MULTILINE):
            made = left.format(name) + gap + block + gap + match.group(1) + right.format(name)
            text = text[: match.start()] + made + text[match.end() :]
    return text


def page(entry: Entry) -> str:
    """The page of one system."""
    card = entry.card
    about = [f"`{entry.name}`", f"[{entry.kind}](index.md#{entry.kind})", *_paper(entry), ", ".join(card.modality)]
    parts = [f"# {_escape(card.title)}", MADE, " · ".join(about), markdown(entry.doc)]
    parts += ["## Claim and evidence", *_evidence(entry), "## Use", _use(entry)]
    if entry.options:
        parts += ["## Options", options(entry.options)]
    parts += ["## How it combines", "\n".join(_facts(entry))]
    if card.limits:
        parts += ["## Limits", _escape(card.limits[0].upper() + card.limits[1:]) + "."]
    return "\n\n".join(parts) + "\n"


def index(entries: Sequence[Entry]) -> str:
    """The catalogue page: a table a kind, then the baselines."""
    parts = ["# Systems", MADE, "One file each; the folder says the kind, and the kind says the verb."]
    for name, kind in KINDS.items():
        found = [entry for entry in entries if entry.kind == name]
        if found:
            parts += [f"## {name}", f"{_code(kind.verb)} gives {_code(kind.result)}.", catalogue(found, "")]
    return "\n\n".join(parts) + "\n"


def catalogue(entries: Iterable[Entry], folder: str = "docs/systems/") -> str:
    """One row a system, by kind."""
    order = list(KINDS)
    rows = [
        (f"[`{entry.name}`]({folder}{entry.name}.md)", entry.kind, _escape(entry.card.title),
         " ".join(_paper(entry)), _escape(entry.card.claim), _escape(_verdict(entry)))
        for entry in sorted(entries, key=lambda entry: (order.index(entry.kind), entry.name))
    ]  # fmt: skip
    return table(("name", "kind", "title", "paper", "claim", "evidence"), rows)


def step(entry: Entry) -> str:
    """A step of the pipeline for the page on recipes."""
    parts = [f"### {entry.name}", markdown(entry.doc.split(": ", 1)[-1][:1].upper() + entry.doc.split(": ", 1)[-1][1:])]
    parts += ["\n".join(lines)] if (lines := list(_facts(entry))) else []
    parts += [options(entry.options)] if entry.options else []
    return "\n\n".join(parts)


def options(specs: Iterable[OptionSpec]) -> str:
    """A table of options."""
    rows = []
    for spec in specs:
        bounds = [f"{sign} {bound:g}" for sign, bound in
                  ((">=", spec.ge), (">", spec.gt), ("<=", spec.le), ("<", spec.lt)) if bound is not None]  # fmt: skip
        bounds += [", ".join(map(str, spec.choices))] if spec.choices else []
        bounds += [f"a name of {spec.names}"] if spec.names else []
        bounds += [f"a name of {spec.system.replace('|', ' or ')}"] if spec.system else []
        bounds += ["a name under `models:`"] if spec.companion else []
        cells = (_code(spec.name), _code(spec.type), _code(_plain(spec.default)))
        rows.append((*cells, " ".join(bounds).replace("<", "&lt;").replace(">", "&gt;"), _escape(spec.help)))
    return table(("option", "type", "default", "bounds", "meaning"), rows)


def demo() -> str:
    """What the stored report of the demo says, as tables."""
    if not DEMO.exists():
        return "No run is recorded yet; `make demo` prints this table for your machine."
    report = Report.from_dict(json.loads(DEMO.read_text(encoding="utf-8")))
    rows = []
    for name in report.metrics():
        metric = metric_of(name)
        values = [arm.values.get(name) for arm in report.arms]
        cells = [_measured(value) if value else "" for value in values]
        rows.append((("- " if metric.inner else "") + metric.label, *cells))
    made = [table(("", *(_escape(arm.label) for arm in report.arms)), rows)]
    if report.comparisons:
        compared = [
            (metric_of(item.metric).label, _escape(f"{report.arm(item.arm).label} − {report.arm(item.baseline).label}"),
             show(item.difference.value, item.difference.unit, signed=True), show_interval(item.difference),
             _escape(show_p(item.p_value)))
            for item in report.comparisons
        ]  # fmt: skip
        made.append(table(("paired, item by item", "", "difference", "95 % interval", ""), compared))
    device = report.device.get("device", "unknown processor")
    cores = f", {report.device['cores']} cores" if "cores" in report.device else ""
    note = f"Measured on {report.created[:10]}, {device}{cores}, seed {report.seed}; data {report.data}."
    return "\n\n".join([*made, _escape(note)])


def speed() -> str:
    """What ``bench decode`` measured: its arms as a table, and what the best drafter adds."""
    found = json.loads(SPEED.read_text(encoding="utf-8"))
    arms, drafters = (part["rows"] for part in found["tables"])
    columns = {
        "tokens_per_s": "tokens/s",
        "prefill_per_s": "prefill, tokens/s",
        "perplexity": "perplexity",
        "megabytes": "MB",
        "bits_per_weight": "bits a weight",
    }
    rows = [(_code(arm["arm"]), *(f"{arm[column]:.4g}" for column in columns)) for arm in arms]
    best: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in drafters:
        texts = best.setdefault(row["base"], {})
        texts[row["text"]] = max(texts.get(row["text"], row), row, key=lambda one: one["ratio"])
    gains = [
        (_code(base), *(f"{row['ratio']:.2f} ({_escape(row['drafter'])})" for row in texts.values()))
        for base, texts in best.items()
    ]
    made = [table(("", *columns.values()), rows), "The best drafter's wall clock over none, texts equal to the token:"]
    made.append(table(("", *next(iter(best.values()))), gains))
    note = f"One run with the arms in turn: {found['date']}, {found['cpu']}, {found['threads']} threads, batch 1."
    return "\n\n".join([*made, _escape(note)])


def serving() -> str:
    """What ``bench serve`` found, beside what it was to find."""
    found = json.loads(SERVING.read_text(encoding="utf-8"))
    rows = [
        (_escape(line["text"]), f"{line['value']:.10g}", _escape(line["target"]), "met" if line["met"] else "missed")
        for line in found["targets"]
    ]
    where = f"{found['date']}, {found['cpu']}, {found['threads']} threads, clients on the same cores."
    note = f"{'; '.join(found['notes'])}. {where}"
    return "\n\n".join([table(("", "measured", "asked for", ""), rows), _escape(note)])


def _measured(value: Value) -> str:
    interval = show_interval(value)
    return show(value.value, value.unit) + (f" ({interval})" if interval else "")


def nav(entries: Sequence[Entry]) -> Iterator[str]:
    """The lines of mkdocs.yml that list the pages of systems."""
    for kind in KINDS:
        found = [entry for entry in entries if entry.kind == kind]
        if found:
            yield f"    - {kind}:"
            yield from (f"      - {entry.name}: systems/{entry.name}.md" for entry in found)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(doc: str) -> str:
    """A docstring: indented lines become a code block, double quotes of code single ones, the rest is escaped."""
    out: list[str] = []
    code: list[str] = []
    for line in [*doc.splitlines(), ""]:
        indented = line.startswith("    ") or (bool(code) and not line.strip())
        if indented:
            code.append(line[4:])
            continue
        if code:
            blank = not code[-1].strip()
            out += ["", "```text", *"\n".join(code).strip("\n").split("\n"), "```", ""]
            out = out[:-1] if not blank and not line.strip() else out
            code = []
        out.append(_prose(line))
    if code:
        out += ["", "```text", *"\n".join(code).strip("\n").split("\n"), "```"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _prose(line: str) -> str:
    line = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", line)
    pieces = re.split(r"``(.+?)``", line)
    return "".join(_code(piece) if place % 2 else _escape(piece) for place, piece in enumerate(pieces))


def _evidence(entry: Entry) -> Iterator[str]:
    """Verdict, what had to be seen, the arms, and how it was measured."""
    if entry.card.claim:
        yield f"> {_escape(entry.card.claim)}"
    found = read_evidence(entry)
    if found is None:
        yield "A baseline: nothing is to be proved of it." if entry.card.builtin else "Not measured yet."
        return
    low, high = ("?" if bound is None else f"{bound:.4g}" for bound in found["interval"])
    effect = f"{found['effect']:.4g} [{low}, {high}] {found['unit']}"
    yield f"**{STATES[status(entry)['status']].capitalize()}.** {_escape(found['result'])}, against " + _escape(
        f"{found['baseline']}: {effect}."
    )
    rows = [("shown" if line["shown"] else "not shown", _escape(line["text"]), _escape(line["figures"]))
            for line in found["must_see"]]  # fmt: skip
    if rows:
        yield table(("", "what has to be seen", "figures"), rows)
    if found["notes"]:
        yield "\n".join(f"- {_escape(note)}" for note in found["notes"])
    yield _arms(found["figures"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    seeds = ", ".join(map(str, found["seeds"]))
    how = f"Measured on {found['date']}, {found['device']}, seeds {seeds}, {found['seconds']:.0f} s in all; {versions}."
    yield f"{_escape(how)} Again: `gossamer prove {entry.name}`."


def _arms(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean over seeds, with the range where there are several; of a curve only its end."""
    names = list(dict.fromkeys(key for seeds in figures.values() for values in seeds.values() for key in values))
    curves: dict[str, list[str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.+)_(\d+)", name):
            curves.setdefault(match.group(1), []).append(name)
    cut = {name for points in curves.values() if len(points) > 4 for name in sorted(points, key=_number)[:-1]}
    rows = []
    for name in (name for name in names if name not in cut):
        cells = []
        for seeds in figures.values():
            values = [v[name] for v in seeds.values() if isinstance(v.get(name), int | float)]
            cells.append(_spread(values))
        rows.append((_code(name), *cells))
    return table(("mean over seeds (range)", *map(_code, figures)), rows)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ({min(values):.4g} – {max(values):.4g})" if min(values) != max(values) else mean


def _verdict(entry: Entry) -> str:
    found = read_evidence(entry)
    if found is None:
        return "a baseline" if entry.card.builtin else STATES["none"]
    low, high = ("?" if bound is None else f"{bound:.3g}" for bound in found["interval"])
    return f"{STATES[status(entry)['status']]}; {found['effect']:.3g} [{low}, {high}] {found['unit']} ({found['date']})"


def _use(entry: Entry) -> str:
    kind = KINDS[entry.kind]
    call = CALLS.get(entry.kind, kind.verb.split(" | ")[0])
    lines = ["```python", "import gossamer", "", f'gossamer.system("{entry.name}").{call}', "```"]
    if kind.step and "distils" not in entry.card.traits:
        recipe = [f"  - {entry.name}: {{}}"]
    elif kind.option_of:
        outer, inner = kind.option_of.split(".")
        recipe = [f"  - {outer}: {{{inner}: {entry.name}}}"]
    else:
        return "\n".join(lines)
    return "\n".join([*lines, "", "```yaml", "steps:", *recipe, "```"])


def _facts(entry: Entry) -> Iterator[str]:
    """The card's state facts in words, and what it switches on."""
    card = entry.card
    words = (("Needs", card.requires), ("Refused where", card.forbids), ("Afterwards", card.provides),
             ("No longer", card.removes))  # fmt: skip
    for lead, named in words:
        if named:
            yield f"- {lead}: " + "; ".join(" or ".join(FACTS[one] for one in fact.split("|")) for fact in named)
    if card.traits:
        yield "- Traits, which switch contract laws on: " + ", ".join(map(_code, card.traits))
    if card.registers:
        yield "- Registers: " + ", ".join(map(_code, card.registers))
    if card.extras:
        yield "- Extras: " + ", ".join(_code(f"pip install 'gossamer[{extra}]'") for extra in card.extras)
    if entry.kind in KINDS:
        yield "- Tried under the contract laws on: " + ", ".join(card.families)
        yield f"- Source: {_code(Path(entry.path).relative_to(ROOT).as_posix())}"


def _paper(entry: Entry) -> list[str]:
    card = entry.card
    if not card.paper:
        return []
    year = f" ({card.year})" if card.year else ""
    known = re.fullmatch(r"\d{4}\.\d{4,5}", card.paper)
    return [f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper}){year}" if known else _escape(card.paper) + year]


def _code(text: str) -> str:
    """Code that may stand in a table."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text or "`" in text else f"`{text}`"


def _plain(value: Any) -> str:
    """A default as a recipe writes it."""
    return json.dumps(value, ensure_ascii=False)


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"([*_`\[\]~\\])", r"\\\1", text)


def main() -> None:
    files = generated()
    for path in superfluous(files):
        path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
