"""Reading rows: every format gives the same rows, every kind of bad input gives its place and its fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gossamer.core.errors import InputError
from gossamer.parts.data_files import Finding
from gossamer.parts.data_rows import as_row, message_weight, read_rows, scan

ROWS = [
    {"prompt": "one, two", "completion": "three\nfour", "weight": 0.5},
    {"prompt": 'a "b"', "completion": "ü"},
]


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _first(source: object) -> Finding:
    errors = [finding for finding in scan(source).findings if finding.severity == "error"]
    assert errors, "no error was found"
    return errors[0]


def _write(path: Path) -> Path:
    if path.suffix == ".csv":
        cells = 'prompt,completion,weight\r\n"one, two","three\nfour",0.5\r\n"a ""b""",ü,\r\n'
        path.write_bytes(b"\xef\xbb\xbf" + cells.encode())
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"weight": None, **row} for row in ROWS]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    else:
        _jsonl(path, *ROWS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read_rows(_write(tmp_path / name))
    assert [row.data for row in rows] == [{k: r[k] for k in ("prompt", "completion")} for r in ROWS]
    assert [row.weight for row in rows] == [0.5, 1.0]
    assert [row.number for row in rows] == [1, 2]


def test_folder_reads_all_files_in_order_and_names_what_it_leaves(tmp_path: Path) -> None:
    _jsonl(tmp_path / "b.jsonl", {"text": "second"})
    _jsonl(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    rows = read_rows(tmp_path)
    assert [row.data["text"] for row in rows] == ["first", "second"]
    assert [Path(f.file).name for f in rows.findings] == ["notes.txt"]
    assert len(read_rows(tmp_path, limit=1)) == 1


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert len(read_rows(_jsonl(tmp_path / "a.json", *ROWS))) == 2


def test_lines_count_blank_ones_and_rows_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": "b", }\n')
    null, broken = [finding for finding in scan(path).findings if finding.severity == "error"]
    assert (null.row, null.line, null.field, null.found) == (2, 3, "text", "null")
    assert (broken.row, broken.line) == (3, 4)
    assert "column" in broken.found
    with pytest.raises(
        InputError, match=r"a\.jsonl row 2 \(line 3\), text: must be a string, got null; write the text"
    ):
        read_rows(path)


@pytest.mark.parametrize(
    ("raw", "offset", "guess"),
    [
        (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', 28, "WINDOWS-1252"),
        ('{"text": "a"}'.encode("utf-16"), 0, "UTF-16"),
        ('{"text": "a"}'.encode("utf-16-le"), 1, "UTF-16"),
    ],
)
def test_wrong_encoding_names_the_byte(tmp_path: Path, raw: bytes, offset: int, guess: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    finding = _first(path)
    assert f"byte offset {offset}, probably {guess}" in finding.found
    assert f"iconv -f {guess}" in finding.fix


def test_pretty_printed_and_listed_json_under_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS, indent=1))
    assert _first(path).fix == "the file is one JSON list: name it .json"
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert "each row on one line" in _first(path).fix


def test_csv_with_a_wrong_number_of_cells_or_an_open_quote(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nc,d,e\nf\n")
    found = [(f.row, f.line, f.found) for f in scan(path).findings]
    assert found == [(2, 3, "more cells"), (3, 4, "fewer cells")]
    path.write_text('prompt,completion\na,"b\n')
    assert "close the quote" in _first(path).fix
    path.write_text("prompt,completion\na," + "b" * 200_000 + "\n")
    assert len(read_rows(path)[0].data["completion"]) == 200_000


def test_cut_parquet_empty_file_and_missing_file(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a.parquet")
    whole.write_bytes(whole.read_bytes()[:-20])
    assert "Parquet" in _first(whole).expected
    for name in ("e.jsonl", "e.json", "e.csv", "e.parquet"):
        (tmp_path / name).write_bytes(b"")
        assert _first(tmp_path / name).found == "an empty file"
    (tmp_path / "e.json").write_text("[]")
    assert _first(tmp_path / "e.json").found == "no rows"
    with pytest.raises(InputError, match=r"did you mean 'e\.jsonl'"):
        read_rows(tmp_path / "ee.jsonl")
    with pytest.raises(InputError, match="hold at least one row"):
        read_rows([])


def test_hub_id_that_cannot_be_had_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        if name == "org/gone":
            raise ConnectionError("offline")
        return [{"question": f"{name} {config} {split}", "answer": "yes"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("org/name:main:test")
    assert rows[0].data == {"prompt": "org/name main test", "completion": "yes"}
    assert rows.mapping == {"question": "prompt", "answer": "completion"}
    with pytest.raises(InputError, match="org/gone: must be a file, a folder or a hub data set, got offline"):
        read_rows("org/gone")


@pytest.mark.parametrize(
    ("row", "shape", "data", "mapping"),
    [
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "completion",
            {"prompt": "Add\n\n1 2", "completion": "3"},
            {"instruction + input": "prompt", "output": "completion"},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "messages",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {
                "conversations": "messages",
                "messages[].from": "messages[].role",
                "messages[].value": "messages[].content",
            },
        ),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
            },
            "preference",
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "good", "rejected": "bad"},
            {"chosen[:-1]": "prompt", "chosen[-1].content": "chosen", "rejected[-1].content": "rejected"},
        ),
    ],
)
def test_other_spellings(row: dict[str, object], shape: str, data: object, mapping: dict[str, str]) -> None:
    before = json.dumps(row)
    rows = read_rows([row])
    assert (rows[0].shape, rows[0].data, rows.mapping) == (shape, data, mapping)
    assert json.dumps(row) == before, "the caller's row was changed"


@pytest.mark.parametrize(
    ("row", "field", "fix"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "write 'assistant'"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "messages[0].role", "did you mean 'assistant'?"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "add the answer"),
        (
            {"messages": [{"role": "assistant", "content": "x", "wieght": 2}]},
            "messages[0].wieght",
            "did you mean 'weight'?",
        ),
        ({"messages": [{"role": "assistant", "content": " "}]}, "messages[0].content", "write the text"),
        ({"messages": []}, "messages", "write [{"),
        ({"messages": "hello"}, "messages", "write [{"),
        ({"prompt": "x", "completon": "y"}, "completon", "did you mean 'completion'?"),
        ({"prompt": "x", "completion": None}, "completion", "write the text"),
        ({"prompt": "x", "completion": 3}, "completion", "one string"),
        ({"prompt": "x", "chosen": "y"}, "rejected", "add 'rejected'"),
        ({"text": "x", "weight": -1}, "weight", "0 takes it out"),
        ({"text": "x", "weight": float("nan")}, "weight", "0 takes it out"),
        ({"text": "x", "weight": True}, "weight", "0 takes it out"),
        ({"txt": "x"}, "", "did you mean 'text'?"),
        (["text"], "", "one of {"),
    ],
)
def test_wrong_rows_name_field_and_fix(row: object, field: str, fix: str) -> None:
    finding = _first([{"text": "fine"}, row] if "text" in str(row) else [row])
    assert finding.field == field
    assert fix in finding.fix


def test_other_keys_are_kept_and_warned_of_once() -> None:
    rows = read_rows([{"text": "a", "source": 1}, {"text": "b", "source": 2}])
    assert [row.extra for row in rows] == [{"source": 1}, {"source": 2}]
    assert [(f.field, f.severity, f.row) for f in rows.findings] == [("source", "warning", 1)]


def test_columns_of_other_shapes_that_are_null_do_not_decide() -> None:
    rows = read_rows([{"text": "a", "messages": None, "prompt": None}])
    assert rows[0].shape == "text"


def test_equal_answers_are_dropped_and_counted_and_pairs_do_not_mix() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = read_rows([pair, {**pair, "rejected": "a"}])
    assert len(rows) == 1
    assert rows.dropped == {"chosen equals rejected": 1}
    assert rows.findings[0].severity == "warning"
    assert "a set of their own" in _first([pair, {"text": "x"}]).fix
    mixed = read_rows([{"text": "x"}, {"prompt": "p", "completion": "c"}])
    assert [f.severity for f in mixed.findings] == ["warning"]


def test_message_weights() -> None:
    weights = [
        message_weight(message)
        for message in (
            {"role": "assistant"},
            {"role": "user"},
            {"role": "assistant", "weight": 0.25},
            {"role": "assistant", "train": False},
            {"role": "user", "train": True},
            {"role": "user", "weight": 0.5},
        )
    ]
    assert weights == [1.0, 0.0, 0.25, 0.0, 1.0, 0.5]


def test_single_rows_name_their_place_and_survive_the_round_trip() -> None:
    with pytest.raises(InputError, match="train row 7, text: must be a string, got null"):
        as_row({"text": None}, file="train", number=7)
    for row in read_rows(ROWS):
        assert as_row(row.as_dict()).as_dict() == row.as_dict()
    assert read_rows(ROWS)[0].as_dict()["weight"] == 0.5


def test_rows_and_doctor_start_without_torch() -> None:
    code = "import sys, gossamer.parts.data_doctor; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
