"""The documentation says what the source says: generated pages are current, links resolve, examples hold."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from gossamer.core.card import read_entry
from gossamer.core.recipe import read_recipe
from gossamer.core.report import Arm, Comparison, Report, StepRecord, Value, measured

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate: ModuleType) -> None:
    files = generate.generated()
    old = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = [str(path.relative_to(ROOT)) for path in [*old, *generate.superfluous(files)]]
    assert not names, f"no longer what the source says: {', '.join(names)}; run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    broken = [target for target in targets if not (page.parent / target).exists()]
    assert not broken, f"{page.name} links to {broken}, which are not there"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/guide/{name}.md" for name in ("adapt", "compress", "narrate", "recipes", "see"))]
)
def test_recipes_in_the_guide_pass_the_check(page: str, tmp_path: Path) -> None:
    found = blocks(page, "yaml")
    assert found
    for block in found:
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/guide/{path.name}" for path in (ROOT / "docs/guide").glob("*"))]
)
def test_commands_in_the_guide_exist(page: str) -> None:
    verbs = {path.stem for path in (ROOT / "src/gossamer/cli").glob("[a-z]*.py")}
    for block in blocks(page, "(?:sh|text)"):
        for verb, rest in re.findall(r"^(?:\$ )?gossamer ([a-z]+)(.*)$", block, flags=re.MULTILINE):
            assert verb in verbs, f"gossamer {verb}"
            source = (ROOT / "src/gossamer/cli" / f"{verb}.py").read_text(encoding="utf-8")
            for flag in re.findall(r" (--[a-z-]+)", rest.split("#")[0]):
                assert f'"{flag}"' in source, f"gossamer {verb} {flag}"


def test_the_worked_example_is_a_system(tmp_path: Path) -> None:
    path = tmp_path / "lion.py"
    path.write_text(blocks("docs/guide/add-a-system.md", "python")[0], encoding="utf-8")
    entry = read_entry(path, name="lion", kind="optimizers", module="lion")
    assert entry is not None
    assert entry.class_name == "Lion"
    assert [spec.name for spec in entry.options] == ["lr", "beta1", "beta2", "weight_decay"]


def test_python_in_the_guide_compiles() -> None:
    for page in PAGES:
        for block in blocks(str(page.relative_to(ROOT)), "python"):
            compile(block, str(page), "exec")


def test_the_demo_table(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "make demo" in _demo(generate, tmp_path / "none.json", monkeypatch)
    arms = [
        Arm("untouched", "untouched | zero-shot", {"chrf": measured("chrf", 10.0, 9.0, 11.0, 96)}, untouched=True),
        Arm("result", "result", {"chrf": measured("chrf", 30.0), "total_bytes": measured("total_bytes", 9.4e7)}),
    ]
    gain = Comparison("chrf", "result", "untouched", Value(20.0, 18.0, 22.0, "points"), 0.0001)
    report = Report("t", "m", "python_functions", 0, "2026-11-23T10:00:00", arms=arms, comparisons=[gain])
    report.steps.append(StepRecord("mos"))
    path = tmp_path / "quickstart.json"
    path.write_text(json.dumps(report.as_dict()), encoding="utf-8")
    text = _demo(generate, path, monkeypatch)
    lines = text.splitlines()
    assert lines[0] == "|  | untouched &#124; zero-shot | result |"
    assert "| chrF | 10.0 (9.0 – 11.0) | 30.0 |" in lines
    assert "| Bytes on disk |  | 94.0 MB |" in lines
    assert any("+20.0 | 18.0 – 22.0 | p &lt; 0.001" in line for line in lines)
    assert lines[-1].startswith("Measured on 2026-11-23")


def _demo(generate: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(generate, "DEMO", path)
    return generate.demo()


def test_docstrings_become_markdown(generate: ModuleType) -> None:
    doc = "Title of x_t.\n\n    y = W * x\n\n    z = |y|\n\nSee ``a|b`` and :mod:`gossamer.core`: [n] < 3."
    expected = (
        "Title of x\\_t.\n\n```text\ny = W * x\n\nz = |y|\n```\n\n"
        "See <code>a&#124;b</code> and `gossamer.core`: \\[n\\] &lt; 3."
    )
    assert generate.markdown(doc) == expected


def test_evidence_becomes_tables(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.core import registry

    entry = dataclasses.replace(registry.find("mos"))
    curve = {f"loss_{step}": 1.0 / step for step in range(1, 7)}
    evidence = {
        "shown": False, "result": "MoS 2.1", "baseline": "LoRA | 2.2", "effect": -0.1, "interval": [-0.2, None],
        "unit": "nats", "must_see": [{"text": "loss <= LoRA's", "figures": "-0.1", "shown": True}],
        "notes": ["one_note"],
        "figures": {"mos": {"1": {**curve, "seconds": 2.0}, "2": {**curve, "seconds": 4.0}}}, "seeds": [1, 2],
        "date": "2026-11-23", "device": "cpu", "seconds": 6.0, "versions": {"torch": "2.13.0"}, "code_hash": "-",
        "parts_hash": "-",
    }  # fmt: skip
    monkeypatch.setattr(generate, "read_evidence", lambda entry: evidence)
    monkeypatch.setattr(generate, "status", lambda entry: {"status": "not_shown"})
    text = generate.page(entry)
    assert "**Not shown.** MoS 2.1, against LoRA &#124; 2.2: -0.1 \\[-0.2, ?\\] nats." in text
    assert "| shown | loss &lt;= LoRA's | -0.1 |" in text
    assert "| `seconds` | 3 (2 – 4) |" in text
    assert "`loss_6`" in text
    assert "`loss_5`" not in text
    assert "not shown; -0.1" in generate.catalogue([entry])
