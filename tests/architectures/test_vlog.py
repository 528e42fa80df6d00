"""VLog against the formula written out; padding, retrieval tokens, baselines, LoRA, the processor and the narrator."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor, GPT2Config, GPT2LMHeadModel

import gossamer
from gossamer.architectures.vlog import VLog
from gossamer.architectures.vlog.configuration import VLogConfig
from gossamer.architectures.vlog.frame_adapter import FrameAdapter, sine_positions
from gossamer.architectures.vlog.modeling import VLogModel, spread
from gossamer.architectures.vlog.processing import VLogProcessor
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.narration import Clip, Narrator, calibrate, clip_rows, instructions, narrate_features, propose
from gossamer.parts.narration_index import NOTHING, NarrationIndex
from gossamer.parts.narration_pairs import narration_pairs
from gossamer.testing.bench import Bench

WIDTHS = {"image_width": 12, "text_width": 10}


class Encoder:
    """Vectors that follow from the text alone; pictures as their mean colour."""

    name, text_width, image_width = "tiny", 10, 12
    text_fingerprint = image_fingerprint = "0123456789abcdef"

    def texts(self, texts: Any) -> torch.Tensor:
        return torch.stack([torch.randn(10, generator=torch.Generator().manual_seed(hash_of(text))) for text in texts])


def hash_of(text: str) -> int:
    return sum((place + 1) * ord(char) for place, char in enumerate(text))


def gpt2() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def base(family: str = "llama") -> Any:
    return gpt2() if family == "gpt2" else Bench(family).model()


def built(family: str = "llama", **options: Any) -> Any:
    return VLog(**WIDTHS, **options).build(base(family))


def processor(method: str = "vlog") -> VLogProcessor:
    made = VLogProcessor(Bench().tokenizer(), method=method, max_frames=8)
    made.encoder = Encoder()
    return made


def batch(frames: tuple[int, ...] = (5, 2, 3), tokens: tuple[int, ...] = (3, 6, 1)) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    rows = [torch.randn(n, 12, generator=draw) for n in frames]
    ids = [torch.randint(4, 320, (n,), generator=draw) for n in tokens]
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        "features": stack(rows, batch_first=True),
        "feature_mask": stack([torch.ones(n) for n in frames], batch_first=True),
        "input_ids": stack(ids, batch_first=True),
        "attention_mask": stack([torch.ones(n) for n in tokens], batch_first=True),
    }


def naive(model: Any, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One row: visual tokens, query, retrieval token, the last state through the out_projector."""
    weight, bias = model.in_projector.layers[-1].weight, model.in_projector.layers[-1].bias
    visual = (features @ weight.T + bias).reshape(-1, model.hidden)
    sequence = [visual, model.language_model.get_input_embeddings()(ids)]
    if model.config.retrieval_token == "pool":
        sequence.append(visual.mean(0, keepdim=True))
    if model.config.retrieval_token == "learnable":
        sequence.append(model.retrieval[None])
    hidden = model.language_model(inputs_embeds=torch.cat(sequence)[None]).last_hidden_state[0, -1]
    return hidden @ model.out_projector.weight.T + model.out_projector.bias


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("token", ["eos", "learnable", "pool"])
def test_a_batch_is_the_formula_row_by_row_in_values_and_gradients(family: str, token: str) -> None:
    model = built(family, retrieval_token=token, visual_tokens=2)
    rows = batch()
    vectors = model.embed(**rows)
    alone = [
        naive(model, f[m.bool()], i[a.bool()])
        for f, m, i, a in zip(
            rows["features"], rows["feature_mask"], rows["input_ids"], rows["attention_mask"], strict=True
        )
    ]
    torch.testing.assert_close(vectors, torch.stack(alone), atol=1e-5, rtol=1e-4)

    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(vectors.square().sum(), trained)
    wanted = torch.autograd.grad(torch.stack(alone).square().sum(), trained)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["vlog", "mean_pool", "pool_query", "adapter"])
def test_padding_on_either_side_changes_nothing(method: str) -> None:
    model, rows = built(method=method), batch()
    vectors = model.embed(**rows)
    flipped = {}
    for name, mask in (("features", "feature_mask"), ("input_ids", "attention_mask")):
        order = rows[mask].argsort(dim=1, stable=True)
        flipped[mask] = rows[mask].gather(1, order)
        wide = order[..., None].expand_as(rows[name]) if rows[name].dim() == 3 else order
        flipped[name] = rows[name].gather(1, wide)
    assert not torch.equal(flipped["input_ids"], rows["input_ids"])
    torch.testing.assert_close(model.embed(**flipped), vectors, atol=1e-5, rtol=1e-4)
    # what stands in padded places must not matter, in the mean of the visual tokens least of all
    rows["features"][~rows["feature_mask"].bool()] = 1e4
    rows["input_ids"][~rows["attention_mask"].bool()] = 7
    torch.testing.assert_close(model.embed(**rows), vectors, atol=1e-5, rtol=1e-4)


def test_the_loss_is_infonce_both_ways_summed() -> None:
    model, rows = built(tau=0.1), batch()
    targets = torch.randn(3, 10)
    out = model(**rows, targets=5 * targets, target_ids=torch.arange(3))
    logits = F.normalize(out.embedding, dim=1) @ F.normalize(targets, dim=1).T / 0.1
    right = torch.arange(3)
    expected = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
    torch.testing.assert_close(out.loss, expected)


def test_symmetric_off_leaves_the_rows() -> None:
    model, rows, targets = built(symmetric=False), batch(), torch.randn(3, 10)
    out = model(**rows, targets=targets)
    logits = F.normalize(out.embedding, dim=1) @ F.normalize(targets, dim=1).T / 0.05
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, torch.arange(3)))


def test_mask_equal_takes_the_same_text_out_of_the_negatives() -> None:
    rows, targets = batch(), torch.randn(3, 10)
    targets[2] = targets[0]
    ids = torch.tensor([0, 1, 0])
    masked, plain = (built(mask_equal=mask)(**rows, targets=targets, target_ids=ids) for mask in (True, False))
    logits = F.normalize(masked.embedding, dim=1) @ F.normalize(targets, dim=1).T / 0.05
    logits[0, 2] = logits[2, 0] = -torch.inf
    right = torch.arange(3)
    torch.testing.assert_close(masked.loss, F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right))
    assert plain.loss > masked.loss


def test_tau_scales_the_logits_of_the_loss() -> None:
    rows, targets = batch(), torch.randn(3, 10)
    warm, cold = (built(tau=tau)(**rows, targets=targets).loss for tau in (1e4, 0.05))
    torch.testing.assert_close(warm, 2 * torch.tensor(3.0).log(), atol=1e-3, rtol=0)
    assert abs(cold - warm) > 1e-3


def test_a_closed_label_set_is_one_cross_entropy_over_all_labels() -> None:
    model, rows, labels = built(), batch(), torch.tensor([4, 0, 2])
    candidates = torch.randn(6, 10)
    out = model(**rows, candidates=candidates, labels=labels)
    logits = F.normalize(out.embedding, dim=1) @ F.normalize(candidates, dim=1).T / 0.05
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, labels))


def test_the_pooled_baselines_are_means() -> None:
    rows = batch()
    model = built(method="mean_pool")
    visual = model.in_projector(rows["features"][1, :2])
    torch.testing.assert_close(model.embed(**rows)[1], model.out_projector(visual.mean(0)), atol=1e-5, rtol=1e-4)
    changed = {**rows, "input_ids": rows["input_ids"] + 1}
    assert torch.equal(model.embed(**changed), model.embed(**rows))

    model = built(method="pool_query")
    words = model.get_input_embeddings()(rows["input_ids"][1])
    both = torch.cat([model.in_projector(rows["features"][1, :2]), words]).mean(0)
    torch.testing.assert_close(model.embed(**rows)[1], model.out_projector(both), atol=1e-5, rtol=1e-4)


def test_the_adapter_is_a_post_norm_transformer_with_positions_on_queries_and_keys() -> None:
    torch.manual_seed(0)
    adapter = FrameAdapter(16).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    places = torch.stack([
        torch.stack([torch.sin(torch.tensor(p / 10_000 ** (c / 16))) if c % 2 == 0
                     else torch.cos(torch.tensor(p / 10_000 ** ((c - 1) / 16))) for c in range(16)]) for p in range(5)
    ])  # fmt: skip
    torch.testing.assert_close(sine_positions(5, 16), places, atol=1e-5, rtol=1e-4)
    expected = x
    for layer in range(2):
        attention = adapter.attention[layer]
        w, b = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k = ((expected + places) @ w[n].T + b[n] for n in (0, 1))
        v = expected @ w[2].T + b[2]
        q, k, v = (t.unflatten(-1, (8, 2)).transpose(1, 2) for t in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        seen = attention.out_proj(seen.transpose(1, 2).flatten(2))
        expected = adapter.norms[2 * layer](expected + seen)
        expected = adapter.norms[2 * layer + 1](expected + adapter.feed[layer](expected))
    got = adapter(x, mask)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_the_generative_baseline_is_the_language_models_loss_and_its_greedy_tokens() -> None:
    model, rows = built(method="generative"), batch(tokens=(5, 6, 3))
    labels = rows["input_ids"].clone()
    labels[:, :2] = -100
    labels[~rows["attention_mask"].bool()] = -100
    out = model(**rows, labels=labels)
    nats, count = 0.0, 0
    for row in range(3):
        real = rows["attention_mask"][row].bool()
        visual = model.in_projector(rows["features"][row][rows["feature_mask"][row].bool()])
        words = model.get_input_embeddings()(rows["input_ids"][row][real])
        logits = model.language_model(inputs_embeds=torch.cat([visual, words])[None]).logits[0]
        torch.testing.assert_close(out.logits[row][real], logits[len(visual) :], atol=1e-4, rtol=1e-3)
        wanted = labels[row][real][2:]
        nats += F.cross_entropy(logits[len(visual) + 1 : -1], wanted, reduction="sum").item()
        count += len(wanted)
    assert out.loss.item() == pytest.approx(nats / count, rel=1e-4)

    written = model.write(**batch(), max_new_tokens=4, min_new_tokens=4)
    alone = {name: tensor[1:2] for name, tensor in batch().items()}
    torch.testing.assert_close(model.write(**alone, max_new_tokens=4, min_new_tokens=4)[0], written[1])
    with pytest.raises(InputError, match="generative"):
        built().write(**batch())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_starts_as_the_base_trains_little_and_merges(family: str, tmp_path: Path) -> None:
    rows, full, model = batch(), built(family), built(family, tune="lora")
    torch.testing.assert_close(model.embed(**rows), full.embed(**rows))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.split(".")[0] in ("in_projector", "out_projector") for name in names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = model.embed(**rows)
    assert not torch.allclose(before, full.embed(**rows))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).eval().embed(**rows), before)
    model.merge()
    torch.testing.assert_close(model.embed(**rows), before, atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(VLogModel.from_pretrained(tmp_path / "merged").eval().embed(**rows), model.embed(**rows))


def test_frozen_trains_what_is_around_the_language_model() -> None:
    model = built(tune="frozen", retrieval_token="learnable")
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"in_projector", "out_projector", "retrieval"}


def test_long_videos_are_thinned_evenly_first_and_last_included() -> None:
    assert spread(300, 128)[[0, -1]].tolist() == [0, 299]
    assert spread(5, 128).tolist() == [0, 1, 2, 3, 4]
    model = built(max_frames=3)
    rows = batch(frames=(9, 2, 3))
    kept = rows["features"][0, [0, 4, 8]]
    torch.testing.assert_close(
        model.embed(**rows)[0], naive(model, kept, rows["input_ids"][0, :3]), atol=1e-5, rtol=1e-4
    )


def test_markers_surround_the_frames() -> None:
    plain, marked = built(seed=0), built(markers=True)
    assert marked.visual_markers.shape == (2, marked.hidden)
    assert not torch.allclose(plain.embed(**batch()), marked.embed(**batch()))


def test_bad_features_and_queries_are_refused() -> None:
    model = built()
    for change, words in (
        ({"features": torch.full((3, 5, 12), float("nan"))}, "NaN"),
        ({"features": torch.randn(3, 5, 13)}, "12 wide"),
        ({"feature_mask": torch.tensor([[1.0] * 5, [0.0] * 5, [1.0] * 5])}, "row 1"),
    ):
        with pytest.raises(InputError, match=words):
            model.embed(**{**batch(), **change})
    limit = model.config.text_config.max_position_embeddings
    with pytest.raises(InputError, match=f"{limit} positions"):
        model.embed(batch()["features"], torch.ones(3, limit, dtype=torch.int64))
    with pytest.raises(OptionError, match="retrieval_token"):
        VLogConfig(base().config, retrieval_token="last")
    with pytest.raises(InputError, match="head"):
        VLog(method="generative", **WIDTHS).build(base().base_model)


def test_saved_model_and_processor_come_back_through_the_auto_classes(tmp_path: Path) -> None:
    model, made = built(retrieval_token="learnable", markers=True), processor()
    made.examples([{"features": torch.randn(3, 12), "question": "What?", "answer": "cut"}])
    model.config.oov_threshold = 0.25
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    again, other = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (type(again), type(other)) == (VLogModel, VLogProcessor)
    assert again.config.oov_threshold == 0.25
    assert other.text_encoder == {"name": "tiny", "width": 10, "fingerprint": "0123456789abcdef"}
    question = [torch.randn(4, 12)], ["What is happening?"]
    torch.testing.assert_close(again.eval().embed(**other.inputs(*question)), model.embed(**made.inputs(*question)))
    foreign = Encoder()
    foreign.image_fingerprint = "ffffffffffffffff"
    with pytest.raises(InputError, match="ffffffffffffffff"):
        other.encoder = foreign


def test_the_encoder_option_names_what_the_processor_opens() -> None:
    made = VLog(encoder="clip-small", **WIDTHS).processor(Bench().tokenizer())
    assert made.encoder_name == "clip-small"
    with pytest.raises(InputError, match="tokenizer"):
        VLog(**WIDTHS).processor()


CLIPS = [Clip(0, 1, "cut a potato"), Clip(1, 2, "cut a potato with a knife"), Clip(2, 3.5, "wash a cup")]


def test_instructions_ask_of_the_clip_its_neighbours_and_the_whole() -> None:
    rows = instructions(CLIPS, "kitchen")
    assert [(row["relation"], row["context"], row["answer"]) for row in rows] == [
        ("current", (0, 1), "cut a potato"),
        ("previous", (1, 2), "cut a potato"),
        ("current", (1, 2), "cut a potato with a knife"),
        ("next", (0, 1), "cut a potato with a knife"),
        ("previous", (2, 3.5), "cut a potato with a knife"),
        ("current", (2, 3.5), "wash a cup"),
        ("next", (1, 2), "wash a cup"),
        ("scene", (0, 3.5), "kitchen"),
    ]
    pairs = narration_pairs(clip.text for clip in CLIPS)
    halves = instructions(CLIPS, None, pairs=pairs, relations=["current"])
    question = "What is the action in the video?"
    assert [(row["question"], row["answer"]) for row in halves] == [
        (question, "cut a potato"),
        (f"{question} cut a potato", ""),
        (question, "cut a potato"),
        (f"{question} cut a potato", "with a knife"),
        (question, "wash a cup"),
        (f"{question} wash a cup", ""),
    ]
    asked = {row["question"] for row in instructions(CLIPS * 20, "x", rng=random.Random(0))}
    assert len(asked) > 8


def test_rows_become_batches_that_train() -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 12)
    narrations = [[clip.start, clip.end, clip.text] for clip in CLIPS]
    rows = [{"features": features, "narrations": narrations, "scene": "kitchen"}]
    made = processor()
    examples = made.examples(rows)
    assert len(examples) == 2 * 7 + 1
    data = made.collate(examples)
    assert data["targets"].shape == (15, 10)
    assert len(set(data["target_ids"].tolist())) == 5  # two prefixes, a postfix, none, the scene
    assert data["feature_mask"].sum(1).tolist()[-1] == 7
    # every column is centred and scaled by what the first rows were
    seen = torch.cat([example["features"] for example in examples])
    torch.testing.assert_close(
        data["features"][0, 0], (features[0] - seen.mean(0)) / seen.std(0, correction=0), atol=1e-3, rtol=1e-3
    )
    model = built()
    loss = model(**data).loss
    loss.backward()
    assert torch.isfinite(loss)

    made.closed = True
    data = made.collate(made.examples(rows)[3:9])
    assert data["candidates"].shape == (5, 10)
    loss = model(**data).loss
    answers = [example["text"] for example in made.examples(rows)[3:9]]
    torch.testing.assert_close(data["candidates"][data["labels"]], Encoder().texts([a or NOTHING for a in answers]))
    assert torch.isfinite(loss)

    data = processor("generative").collate(processor("generative").examples(rows))
    supervised = data["labels"][0][data["labels"][0] != -100].tolist()
    assert Bench().tokenizer().decode(supervised[:-1]) == "cut a potato"
    assert supervised[-1] == Bench().tokenizer().eos_token_id


def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    made, features = processor(), torch.randn(4, 12)
    long = " ".join(["very"] * 200)
    for row, words in (
        ({"features": features}, "question, answer"),
        ({"features": features, "narrations": [[0, 1]]}, "start, end, text"),
        ({"features": features, "narrations": [[3, 4, "x"]]}, "inside the video of 2 s"),
        ({"features": features[:0], "question": "a", "answer": "b"}, "finite"),
        ({"features": features, "question": long, "answer": "b"}, "127 tokens"),
        ({"question": "a", "answer": "b"}, "video or features"),
    ):
        with pytest.raises(InputError, match=words):
            made.examples([row])


def test_rows_of_a_clip() -> None:
    assert clip_rows(0, 1, 2.0, 10) == slice(0, 2)
    assert clip_rows(0.3, 1.2, 2.0, 10) == slice(0, 3)
    assert clip_rows(1.0, 1.1, 2.0, 10) == slice(2, 3)
    for start, end in ((-1, 1), (2, 2), (5.0, 6.0), (4.0, 6.0)):
        with pytest.raises(InputError, match="inside the video of 5 s"):
            clip_rows(start, end, 2.0, 10)


class Oracle:
    """A model whose vector is the text that stands for the frames' first number, and what was asked."""

    config = VLogConfig(GPT2Config(), oov_threshold=0.5)
    device = torch.device("cpu")

    def __init__(self, answers: dict[tuple[int, str], str]) -> None:
        self.answers = answers

    def embed(self, texts: list[tuple[int, str]]) -> torch.Tensor:
        return Encoder().texts([self.answers[text] for text in texts])


class Asked(dict[str, Any]):
    """A batch that stays what was asked."""


def asking(answers: dict[tuple[int, str], str], index: NarrationIndex, **options: Any) -> Narrator:
    model = Oracle(answers)
    narrator = Narrator(model, VLogProcessor(Bench().tokenizer()), index, **options)
    narrator._embed = lambda features, questions: model.embed(  # type: ignore[method-assign]
        [(int(rows[0, 0]), question) for rows, question in zip(features, questions, strict=True)]
    )
    return narrator


def test_decoding_goes_from_scene_to_prefix_to_postfix() -> None:
    rows = [{"text": clip.text, "scene": "kitchen"} for clip in CLIPS]
    index = NarrationIndex.build([*rows, {"text": "dig a hole", "scene": "garden"}], Encoder())
    question, scene = "What is the action in the video?", "What is the overall activity in the video?"
    answers = {
        (0, scene): "kitchen",
        (0, question): "cut a potato", (0, f"{question} cut a potato"): "with a knife",
        (1, question): "wash a cup", (1, f"{question} wash a cup"): "nothing more",
        (2, question): "fly to the moon", (2, f"{question} wash a cup"): "nothing more",
        (2, f"{question} cut a potato"): "nothing more",
    }  # fmt: skip
    narrator = asking(answers, index, batch_size=2, top_scenes=1, others=1)
    clips = [torch.full((2, 12), float(number)) for number in range(3)]
    found = narrator.scene(torch.zeros(6, 12))
    assert found.among is not None
    assert len(found.among.rows) == 2
    told = narrator.narrate(clips, found)
    assert [row.text for row in told[:2]] == ["cut a potato with a knife", "wash a cup"]
    assert [row.known for row in told] == [True, True, False]
    assert told[0].scene == "kitchen"
    assert told[0].others[0].text == "wash a cup"
    brute = asking(answers, index, search="brute", use_postfix=False)
    assert [row.text for row in brute.narrate(clips[:2], brute.scene(torch.zeros(6, 12)))] == [
        "cut a potato",
        "wash a cup",
    ]
    index.add(["fly to the moon"], Encoder(), scene="kitchen")
    answers[2, f"{question} fly to the moon"] = "nothing more"
    again = narrator.narrate(clips, narrator.scene(torch.zeros(6, 12)))[2]
    assert (again.text, again.known) == ("fly to the moon", True)


def test_the_narrator_works_on_the_model_and_refuses_a_foreign_vocabulary() -> None:
    made, model = processor(), built()
    index = NarrationIndex.build([clip.text for clip in CLIPS], Encoder())
    before = copy.deepcopy(model.state_dict())
    told = narrate_features(model, made, index, torch.randn(8, 12), [(0, 1), (1, 2.5), (3, 4)])
    assert all(row.text in {clip.text for clip in CLIPS} | {"wash a cup with a knife"} for row in told)
    index.add(["peel a mango"], Encoder())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    index.encoder["fingerprint"] = "ffffffffffffffff"
    with pytest.raises(InputError, match="ffffffffffffffff"):
        Narrator(model, made, index)
    with pytest.raises(OptionError, match="hierarchical"):
        Narrator(model, made, index, search="hierarchic")


def test_thresholds_come_from_scores_and_proposals_are_cleaned() -> None:
    assert calibrate([n / 100 for n in range(101)]) == pytest.approx(0.05)
    with pytest.raises(InputError, match="at least one"):
        calibrate([])
    prompts = []
    scene, actions = propose(
        "picture",
        lambda image: f"A man in a {image}. ",
        lambda prompt: (
            prompts.append(prompt) or " Peel mango; cut bread;cut bread; ; do one thing after the other.\n\nX"
        ),
    )
    assert (scene, actions) == ("A man in a picture.", ["peel mango", "cut bread"])
    assert "Scene: A man in a picture." in prompts[0]
    with pytest.raises(InputError, match="scene and actions"):
        propose("picture", lambda image: "x", lambda prompt: " ; ")


def test_the_registry_builds_it() -> None:
    assert isinstance(gossamer.system("vlog", **WIDTHS), VLog)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("token", ["eos", "learnable", "pool"])
@pytest.mark.parametrize("lengths", [(2, 3, 1, 2), (2, 2, 2, 2)])
def test_a_longer_question_on_kept_keys_and_values_is_the_question_asked_anew(
    family: str, token: str, lengths: tuple[int, ...]
) -> None:
    model, rows = built(family, retrieval_token=token), processor()
    generator = torch.Generator().manual_seed(2)
    clips = [torch.randn(frames, 12, generator=generator) for frames in lengths]
    question, prefixes = "Name a colour:", ["red", "say", "water the red flower slowly", "the dog"]
    first, kept = model.embed_keeping(**rows.inputs(clips, [question] * 4))
    assert torch.allclose(first, model.embed(**rows.inputs(clips, [question] * 4)), atol=1e-5)
    longer = rows.continued(question, prefixes)
    assert longer is not None
    anew = model.embed(**rows.inputs(clips, [f"{question} {prefix}" for prefix in prefixes]))
    assert torch.allclose(model.embed_on(kept, **longer), anew, atol=1e-4)
    assert not torch.allclose(anew, first, atol=1e-2)
