"""Vocabulary files: search by brute force, by scene and approximately; additions; round trip; refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.core.errors import InputError, OptionError
from gossamer.parts import narration_index
from gossamer.parts.narration_index import NOTHING, NarrationIndex
from gossamer.parts.nearest import InvertedFile, best, unit

ROWS = [
    {"text": "cut a potato", "video": "v1", "scene": "kitchen"},
    {"text": "cut a potato with a knife", "video": "v1", "scene": "kitchen"},
    {"text": "wash a cup", "video": "v2", "scene": "kitchen"},
    {"text": "dig a hole", "video": "v3", "scene": "garden"},
    {"text": "dig a hole with a spade", "video": "v3", "scene": "garden"},
]


class Words:
    """An encoder whose vector of a text is the sum of its words' fixed random vectors."""

    name, text_width, text_fingerprint = "words", 32, "0123456789abcdef-7f7f"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def texts(self, texts: Any) -> torch.Tensor:
        self.asked += texts
        return torch.stack([sum((self._word(word) for word in text.split()), torch.zeros(32)) for text in texts])

    def _word(self, word: str) -> torch.Tensor:
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder() -> Words:
    return Words()


@pytest.fixture
def index(encoder: Words) -> NarrationIndex:
    return NarrationIndex.build(ROWS, encoder)


def test_prefixes_postfixes_videos_and_counts(index: NarrationIndex, encoder: Words) -> None:
    assert index.prefixes == ["cut a potato", "wash a cup", "dig a hole"]
    assert index.postfixes == ["", "with a knife", "with a spade"]
    assert [(video.name, video.scene, video.rows) for video in index.videos] == [
        ("v1", "kitchen", [0]), ("v2", "kitchen", [1]), ("v3", "garden", [2])]  # fmt: skip
    assert index.counts == {(0, 0): 1, (0, 1): 1, (1, 0): 1, (2, 0): 1, (2, 2): 1}
    assert set(index.narrations()) == {row["text"] for row in ROWS}
    torch.testing.assert_close(index.postfix_vectors[0], encoder.texts([NOTHING])[0])


def test_a_text_is_found_by_its_own_vector_at_any_length(index: NarrationIndex, encoder: Words) -> None:
    hits = index.search(1e-3 * encoder.texts(index.prefixes), k=2)
    assert [row[0].text for row in hits] == index.prefixes
    assert all(row[0].score == pytest.approx(1, abs=1e-5) and row[0].score > row[1].score for row in hits)
    assert index.search_postfixes(encoder.texts([NOTHING]))[0][0].text == ""


def test_brute_search_is_the_plain_cosine(index: NarrationIndex) -> None:
    queries = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], index.prefix_vectors[None], dim=-1)
    for query, hits in zip(cosines, index.search(queries, k=9, method="brute"), strict=True):
        assert [hit.row for hit in hits] == query.argsort(descending=True).tolist()
        torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), query.sort(descending=True).values)


def test_a_scene_query_limits_the_search_to_its_videos(index: NarrationIndex, encoder: Words) -> None:
    among = index.candidates(encoder.texts(["kitchen"])[0], top=2)
    assert among is not None
    assert [video.text for video in among.videos] == ["v2", "v1"]
    assert among.rows == [0, 1]
    hits = index.search(encoder.texts(["dig a hole", "wash a cup"]), k=3, among=among)
    assert "dig a hole" not in [hit.text for hit in hits[0]]
    assert hits[1][0].text == "wash a cup"
    scene = index.scene(encoder.texts(["garden"])[0])
    assert scene is not None
    assert scene.text == "garden"


def test_without_scenes_everything_is_searched(encoder: Words) -> None:
    plain = NarrationIndex.build(["peel a mango", "peel a mango slowly"], encoder)
    assert plain.candidates(torch.ones(32)) is None
    assert plain.scene(torch.ones(32)) is None
    assert NarrationIndex.build(["a", "a b"], encoder, pairs=False).prefixes == ["a", "a b"]


def test_what_is_added_is_found_at_once_in_its_scene_and_without_one(index: NarrationIndex, encoder: Words) -> None:
    encoder.asked.clear()
    assert index.add(["peel a mango", "wash a cup"], encoder, scene="kitchen") == ["peel a mango"]
    assert encoder.asked == ["peel a mango"]
    assert index.add(["fly a kite", "fly  a kite"], encoder) == ["fly a kite"]
    assert index.add(["water a rose"], encoder, scene="park") == ["water a rose"]
    for scene, text in (("kitchen", "peel a mango"), ("garden", "fly a kite"), ("park", "water a rose")):
        among = index.candidates(encoder.texts([scene])[0], top=1)
        assert index.search(encoder.texts([text]), among=among)[0][0].text == text
    assert len(set(index.prefixes)) == len(index.prefixes) == 6


def test_an_addition_made_of_known_parts_becomes_a_candidate_and_no_new_entry(
    index: NarrationIndex, encoder: Words
) -> None:
    assert index.add(["dig a hole with a knife"], encoder, scene="kitchen") == []
    among = index.candidates(encoder.texts(["kitchen"])[0], top=1)
    assert among is not None
    assert among.rows == [index.prefixes.index("wash a cup"), index.prefixes.index("dig a hole")]


def test_many_additions_to_a_scene_stay_one_video_and_displace_nothing(index: NarrationIndex, encoder: Words) -> None:
    for number in range(15):
        index.add([f"stir pot {number}"], encoder, scene="kitchen")
    among = index.candidates(encoder.texts(["kitchen"])[0], top=1)
    assert among is not None
    assert [video.text for video in among.videos] == ["added: kitchen", "v2"]
    assert len(among.rows) == 16


def test_saved_and_loaded_it_is_the_same(index: NarrationIndex, encoder: Words, tmp_path: Path) -> None:
    index.add(["fly a kite"], encoder)
    index.add(["peel a mango"], encoder, scene="kitchen")
    index.save(tmp_path / "a.vocab")
    again = NarrationIndex.load(tmp_path / "a.vocab", encoder)
    assert sorted(path.name for path in (tmp_path / "a.vocab").iterdir()) == ["vocab.json", "vocab.safetensors"]
    assert (again.prefixes, again.postfixes, again.videos) == (index.prefixes, index.postfixes, index.videos)
    assert (again.anywhere, again.counts) == (index.anywhere, index.counts)
    query = torch.randn(3, 32)
    assert again.search(query, k=4, among=again.candidates(query[0])) == index.search(
        query, k=4, among=index.candidates(query[0])
    )


def test_it_is_refused_with_another_encoder(index: NarrationIndex, encoder: Words, tmp_path: Path) -> None:
    index.save(tmp_path / "a.vocab")
    other = Words()
    other.text_fingerprint = "ffffffffffffffff-7f7f"
    with pytest.raises(InputError, match="ffffffffffffffff"):
        NarrationIndex.load(tmp_path / "a.vocab", other)
    with pytest.raises(InputError, match="with that encoder"):
        index.add(["x"], other)
    other.text_fingerprint = "0123456789abcdef-7f80"  # one step of rounding on another machine
    NarrationIndex.load(tmp_path / "a.vocab", other)


def test_broken_and_empty_vocabularies_are_refused(encoder: Words, index: NarrationIndex, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one narration"):
        NarrationIndex.build([{"text": "  "}], encoder)
    with pytest.raises(InputError, match="at least one narration"):
        index.add([" "], encoder)
    with pytest.raises(InputError, match=r"vocab\.json"):
        NarrationIndex.load(tmp_path / "none.vocab")
    index.save(tmp_path / "a.vocab")
    path = tmp_path / "a.vocab" / "vocab.json"
    path.write_text(path.read_text().replace('"wash a cup",', ""))
    with pytest.raises(InputError, match="shape"):
        NarrationIndex.load(tmp_path / "a.vocab")


def test_queries_that_do_not_fit_are_refused(index: NarrationIndex) -> None:
    with pytest.raises(InputError, match=r"\[n, 32\]"):
        index.search(torch.ones(1, 8))
    with pytest.raises(InputError, match="NaN"):
        index.search(torch.full((1, 32), float("nan")))
    with pytest.raises(OptionError, match="brute"):
        index.search(torch.ones(1, 32), method="brut")


def test_equal_scores_go_to_the_lower_row() -> None:
    entries = unit(torch.tensor([[1.0, 0], [0, 1], [2, 0], [3, 0]]))
    assert best(entries[:1], entries, 3)[0][0][1] == 0
    assert best(entries[:1], entries, 1) == [[(1.0, 0)]]


def test_approximate_search_takes_over_when_it_is_large(
    index: NarrationIndex, encoder: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add([f"move thing {number}" for number in range(600)], encoder)
    queries = encoder.texts([f"move thing {number}" for number in range(0, 600, 20)])
    exact = index.search(queries)
    used = []
    plain = InvertedFile.best
    monkeypatch.setattr(narration_index, "LARGE", 500)
    monkeypatch.setattr(InvertedFile, "best", lambda self, *args: used.append(1) or plain(self, *args))
    found = index.search(queries)
    assert used
    assert sum(a[0].text == b[0].text for a, b in zip(exact, found, strict=True)) >= 28
    index.add(["spin a top"], encoder)  # the file is made anew
    assert index.search(encoder.texts(["spin a top"]))[0][0].text == "spin a top"
