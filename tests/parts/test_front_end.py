from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError
from gossamer.parts.front_end import (
    IGNORED,
    Projector,
    embed_tokens,
    embedding_size,
    last_real,
    marker_places,
    mean_real,
    splice,
)
from gossamer.testing.bench import Bench

FAMILIES = ("llama", "gemma3", "gpt2")
WIDTH = 24  # of the encoder's features
LENGTHS, VISUAL, PLACES = (5, 9, 2), (4, 0, 3), (0, 3, 1)


def rows() -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and features of three rows, all lengths different, the second without an image."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 300, (length,), generator=generator) for length in LENGTHS]
    return ids, [torch.randn(count, WIDTH, generator=generator) for count in VISUAL]


def projector(model: Any) -> Projector:
    torch.manual_seed(3)
    made = Projector("mlp", WIDTH, 64)
    made.match(model)
    return made


def naive(model: Any, project: Projector, ids: Tensor, features: Tensor, place: int) -> Tensor:
    """Last hidden states [t, H] of one row, without a mask or positions."""
    words = model.get_input_embeddings()(ids)
    whole = torch.cat([words[:place], project(features), words[place:]])
    return model(inputs_embeds=whole[None], output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_its_rows_one_by_one(family: str, side: Any) -> None:
    model = Bench(family).model()
    project = projector(model)
    ids, features = rows()
    alone = [naive(model, project, *row) for row in zip(ids, features, PLACES, strict=True)]
    sum(states[-1].square().sum() + states.mean(0).sum() for states in alone).backward()
    expected = [p.grad.clone() for p in [*project.parameters(), model.get_input_embeddings().weight]]
    for parameter in [*project.parameters(), *model.parameters()]:
        parameter.grad = None

    words = [embed_tokens(model, row) for row in ids]
    batch = splice(words, [project(row) for row in features], places=PLACES, side=side)
    states = model(**batch.inputs(), output_hidden_states=True).hidden_states[-1]
    mask = batch.attention_mask
    for row, one in enumerate(alone):
        torch.testing.assert_close(states[row][mask[row].bool()], one, atol=1e-5, rtol=1e-5)
    last = last_real(states, mask)
    torch.testing.assert_close(last, torch.stack([one[-1] for one in alone]), atol=1e-5, rtol=1e-5)
    means = mean_real(states, mask)
    torch.testing.assert_close(means, torch.stack([one.mean(0) for one in alone]), atol=1e-5, rtol=1e-5)
    (last.square().sum() + means.sum()).backward()
    for parameter, grad in zip([*project.parameters(), model.get_input_embeddings().weight], expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_the_batch_is_the_plain_model(family: str) -> None:
    """In particular Gemma's embedding scale is there, once."""
    model = Bench(family).model()
    ids, _ = rows()
    batch = splice([embed_tokens(model, row) for row in ids], [torch.zeros(0, 64)] * 3, side="left")
    with torch.no_grad():
        logits = model(**batch.inputs()).logits
        for number, row in enumerate(ids):
            plain = model(input_ids=row[None]).logits[0]
            torch.testing.assert_close(logits[number, -len(row) :], plain, atol=1e-5, rtol=1e-5)


def test_padded_tokens_give_what_packed_ones_give() -> None:
    model = Bench("llama").model()
    ids, features = rows()
    project = projector(model)
    visual = [project(row) for row in features]
    packed = splice([embed_tokens(model, row) for row in ids], visual, places=PLACES, labels=ids)
    for side in ("left", "right"):
        wide = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side=side)
        ones = [torch.ones_like(row) for row in ids]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
        padded = splice(embed_tokens(model, wide), visual, mask=mask, places=PLACES, labels=wide)
        assert torch.equal(padded.inputs_embeds, packed.inputs_embeds)
        assert torch.equal(padded.position_ids, packed.position_ids)
        assert padded.labels is not None
        assert packed.labels is not None
        assert torch.equal(padded.labels, packed.labels)


def test_labels_leave_out_visual_places_and_padding() -> None:
    ids, features = rows()
    words = [torch.zeros(len(row), WIDTH) for row in ids]
    batch = splice(words, features, places=PLACES, labels=ids, side="left")
    assert batch.labels is not None
    assert batch.labels[batch.visual].eq(IGNORED).all()
    assert batch.labels[~batch.attention_mask.bool()].eq(IGNORED).all()
    kept = [row[row != IGNORED] for row in batch.labels]
    assert all(torch.equal(row, wanted) for row, wanted in zip(kept, ids, strict=True))
    assert batch.visual.sum(1).tolist() == list(VISUAL)
    assert batch.visual[2].tolist() == [False] * 4 + [False, True, True, True, False]
    assert batch.position_ids[2].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]


def test_a_marker_gives_way_to_its_block() -> None:
    ids = [torch.tensor([7, 99, 8, 99]), torch.tensor([99, 5]), torch.tensor([5, 6])]
    words = [row[:, None].float() for row in ids]
    blocks = [[torch.full((2, 1), -1.0), torch.full((3, 1), -2.0)], [torch.full((1, 1), -3.0)], []]
    batch = splice(words, blocks, places=marker_places(ids, 99), replace=True)
    assert batch.inputs_embeds[0, :, 0].tolist() == [7, -1, -1, 8, -2, -2, -2]
    assert batch.inputs_embeds[1, :2, 0].tolist() == [-3, 5]
    assert batch.attention_mask.sum(1).tolist() == [7, 2, 2]


@pytest.mark.parametrize("kind", Projector.KINDS)
def test_a_projector_makes_tokens_of_the_embeddings_size(kind: str) -> None:
    model = Bench("gemma3").model()
    project = Projector(kind, WIDTH, 64, tokens=3)
    sample = 7 + 5 * torch.randn(50, 2, WIDTH)
    project.match(model, sample)
    made = project(sample)
    assert made.shape == (50, 6, 64)
    table = model.get_input_embeddings()
    scaled = table(torch.arange(320)).square().mean().sqrt().item()
    assert scaled == pytest.approx(8 * table.weight.square().mean().sqrt().item(), rel=1e-4)
    assert embedding_size(model) == pytest.approx(scaled, rel=1e-4)
    assert made.square().mean().sqrt().item() == pytest.approx(scaled, rel=1e-3)
    nonlinear = (project(2 * sample) - project(torch.zeros_like(sample)) - 2 * (made - project(0 * sample))).abs().max()
    assert (nonlinear > 1e-2) == (kind != "linear")


def test_bad_input_is_refused() -> None:
    words, block = [torch.zeros(4, 8), torch.zeros(2, 8)], torch.zeros(2, 3, 8)
    with pytest.raises(InputError, match=r"row 1: must have its visual block at a place from 0 to 2, got 3"):
        splice(words, block, places=3)
    with pytest.raises(InputError, match=r"blocks \[n, 8\], got shape \(3, 5\); project"):
        splice(words, torch.zeros(2, 3, 5))
    with pytest.raises(InputError, match="visual blocks: must be 2"):
        splice(words, block[:1])
    with pytest.raises(InputError, match="places: must be given for 2 rows, got 3"):
        splice(words, block, places=[0, 0, 0])
    with pytest.raises(InputError, match="one place for each visual block, got 2 for 1"):
        splice(words, block, places=[[0, 1], [0]])
    with pytest.raises(InputError, match="a label for each of 4 tokens"):
        splice(words, block, labels=[torch.zeros(3), torch.zeros(2)])
    with pytest.raises(InputError, match="mask: must be of the padded rows' shape"):
        splice(torch.zeros(2, 4, 8), block, mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="row 1 of the batch: must hold a real place"):
        last_real(torch.zeros(2, 3, 8), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(InputError, match="must be 8 wide, got width 4"):
        Projector("linear", 8, 8)(torch.zeros(1, 4))
    with pytest.raises(OptionError, match="did you mean 'mlp'"):
        Projector("mpl", 8, 8)
    with pytest.raises(OptionError, match="'left' or 'right'"):
        splice(words, block, side="middle")  # type: ignore[arg-type]
