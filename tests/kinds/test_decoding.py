"""The three forms of decoding: states per request, joining and leaving, verification, and the way through generate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteria,
)

from gossamer.core.errors import InputError
from gossamer.kinds.decoding import (
    Draft,
    DrafterDecoding,
    LoopDecoding,
    ProcessorDecoding,
    RequestState,
)
from gossamer.parts.several_models import CachedModel, Row

VOCABULARY, WINDOW = 48, 8


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma3(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, max_position_embeddings=128, initializer_range=0.3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=40, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": llama, "gemma3": gemma3, "gpt2": gpt2}


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Without any cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


class Penalty(ProcessorDecoding):
    """Lowers the scores of tokens that a request has emitted: a shift that needs the right state for each row."""

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> RequestState:
        return RequestState(prompt)

    def shift(self, states: Sequence[RequestState], scores: torch.Tensor) -> torch.Tensor:
        out = scores.clone()
        for row, state in enumerate(states):
            for token in state.tokens:
                out[row, token] -= 1.5
        return out


class Guess(DrafterDecoding):
    """Drafts what a table says, right or wrong."""

    switch_off = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drafts: dict[int, Draft] = {}
        self.seen: list[tuple[int, int]] = []

    @property
    def draft_tokens(self) -> int:
        return 4

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> RequestState:
        return RequestState(prompt)

    def draft(self, states: Sequence[RequestState], k: int) -> list[Draft]:
        return [self.drafts.get(len(state.tokens), Draft([7, 7, 7][:k])) for state in states]

    def observe(self, states: Sequence[Any], accepted: Sequence[Sequence[int]], hidden: Any) -> None:
        self.seen += [(len(tokens), h.shape[1]) for tokens, h in zip(accepted, hidden, strict=True)]

    def hidden(self, model: Any) -> tuple[int, ...]:
        return (-1,)


class Pairs(LoopDecoding):
    """Emits two greedy tokens a step."""

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> RequestState:
        return RequestState(prompt)

    def step(self, model: Any, states: Sequence[RequestState]) -> list[list[int]]:
        emitted: list[list[int]] = [[] for _ in states]
        for _ in range(2):
            news = [state.ids[state.past.length :] for state in states]
            logits = self.base(model).forward([state.past for state in states], news).logits
            for state, tokens, table in zip(states, emitted, logits, strict=True):
                tokens.append(state.choice.pick(state.ids, table[0]))
                state.accept(tokens[-1])
        return emitted


def penalised(model: Any, ids: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].clone()
        for token in tokens:
            scores[token] -= 1.5
        tokens.append(int(scores.argmax()))
    return tokens


@pytest.mark.parametrize("family", MODELS)
def test_rows_of_any_company_and_order_give_the_logits_of_the_whole_text(family: str) -> None:
    model = MODELS[family]()
    cached = CachedModel(model)
    texts = [prompt(30, 1), prompt(27, 2), prompt(24, 3)]
    rows = [Row() for _ in texts]
    plan = [((0, 5), (1, 9)), ((1, 1), (0, 1)), ((2, 7),), ((2, 3), (0, 6), (1, 2)), ((2, 1), (1, 1), (0, 1))]
    for turn in plan:
        took = [texts[n][rows[n].length : rows[n].length + count] for n, count in turn]
        out = cached.forward([rows[n] for n, _ in turn], took, keep=[count for _, count in turn])
        for (n, count), logits in zip(turn, out.logits, strict=True):
            with torch.no_grad():
                whole = model(input_ids=torch.tensor([texts[n][: rows[n].length]])).logits[0]
            torch.testing.assert_close(logits, whole[-count:], atol=2e-5, rtol=1e-4)
    assert rows[0].length == 13


@pytest.mark.parametrize("family", MODELS)
def test_a_cut_row_and_its_fork_go_on_as_if_nothing_had_been(family: str) -> None:
    model, text = MODELS[family](), prompt(30, 4)
    cached, row = CachedModel(model), Row()
    cached.forward([row], [text[:20]])
    twin = row.fork()
    row.crop(12)
    other = prompt(6, 5)
    out = cached.forward([twin, row], [text[20:23], other])
    for ids, logits in ((text[:23], out.logits[0]), (text[:12] + other, out.logits[1])):
        with torch.no_grad():
            torch.testing.assert_close(
                logits[0], model(input_ids=torch.tensor([ids])).logits[0, -1], atol=2e-5, rtol=1e-4
            )


def test_the_batch_is_carried_on_without_copying_while_rows_stay() -> None:
    cached, rows = CachedModel(llama()), [Row(), Row()]
    cached.forward(rows, [[3, 4], [5, 6]])
    first = cached._batch
    cached.forward(rows, [[7], [8]])
    assert first is not None
    assert cached._batch is not None
    assert cached._batch[1] is first[1]
    cached.forward(rows[::-1], [[7], [8]])
    assert cached._batch[1] is not first[1]


def test_models_without_keys_and_values_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="keep its past as keys and values"):
        CachedModel(MambaForCausalLM(config)).forward([Row()], [[3, 4]])


@pytest.mark.parametrize("form", [Penalty, Guess, Pairs])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_requests_join_and_leave_in_mid_flight_and_get_the_tokens_that_they_get_alone(family: str, form: Any) -> None:
    model, prompts = MODELS[family](), [prompt(11, 1), prompt(4, 2), prompt(7, 3)]
    reference = penalised if form is Penalty else greedy
    alone = [reference(model, ids, 12) for ids in prompts]
    system = form()
    first, second = (system.open(model, ids) for ids in prompts[:2])
    system.step(model, [first, second])
    system.step(model, [second, first])
    system.step(model, [first])
    third = system.open(model, prompts[2])
    system.step(model, [third, first])
    first.close()
    while len(second.tokens) < 12 or len(third.tokens) < 12:
        system.step(model, [second, third])
    assert first.tokens == alone[0][: len(first.tokens)]
    assert second.tokens[:12] == alone[1]
    assert third.tokens[:12] == alone[2]


@pytest.mark.parametrize("form", [Penalty, Guess, Pairs])
def test_generate_gives_the_same_for_a_padded_batch_and_stops_as_the_model_does(form: Any) -> None:
    model, prompts = llama(), [prompt(9, 1), prompt(5, 2)]
    reference = penalised if form is Penalty else greedy
    alone = [reference(model, ids, 10) for ids in prompts]
    inputs = {
        "input_ids": torch.tensor([prompts[0], [0] * 4 + prompts[1]]),
        "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    }
    assert form().generate(model, None, inputs, max_new_tokens=10).tokens == alone
    end = alone[0][4]
    done = form().generate(model, None, inputs, max_new_tokens=10, eos_token_id=end).tokens
    assert done[0] == alone[0][: alone[0].index(end) + 1]
    assert done[1] == (alone[1][: alone[1].index(end) + 1] if end in alone[1] else alone[1])


@pytest.mark.parametrize("form", [Penalty, Guess, Pairs])
def test_own_criteria_and_streamers_see_one_column_after_the_other(form: Any) -> None:
    class Widths(StoppingCriteria):
        def __init__(self) -> None:
            self.widths: list[int] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.widths.append(input_ids.shape[1])
            return torch.tensor([False] * input_ids.shape[0])

    criteria = Widths()
    inputs = {"input_ids": torch.tensor([prompt(5, 1), prompt(5, 2)])}
    form().generate(llama(), None, inputs, max_new_tokens=6, stopping_criteria=[criteria, MaxLengthCriteria(9)])
    assert criteria.widths == [6, 7, 8, 9]


def test_a_draft_is_cut_to_the_room_that_is_left() -> None:
    model = gpt2()
    inputs = {"input_ids": torch.tensor([prompt(32, 1)])}
    assert Guess().generate(model, None, inputs, max_new_tokens=8).tokens == [greedy(model, prompt(32, 1), 8)]


def test_right_and_wrong_drafts_and_trees_give_the_models_own_tokens() -> None:
    model, ids = llama(), prompt(6, 1)
    truth = greedy(model, ids, 12)
    wrong = [(token + 1) % VOCABULARY for token in truth]
    system = Guess()
    system.drafts = {
        0: Draft(truth[:4]),
        5: Draft([truth[5], truth[6], wrong[7]]),
        8: Draft([truth[8], wrong[9], truth[9]], parents=[-1, 0, 0]),
    }
    state = system.open(model, ids)
    emitted = [system.step(model, [state])[0] for _ in range(3)]
    assert [len(tokens) for tokens in emitted] == [5, 3, 3]
    assert list(itertools.chain(*emitted)) == truth[:11]
    assert system.seen == [(0, 5), (5, 5), (3, 3), (3, 3)]


def test_processor_runs_before_bans_and_temperature() -> None:
    class Lift(Penalty):
        def shift(self, states: Any, scores: torch.Tensor) -> torch.Tensor:
            assert torch.isfinite(scores).all()
            return scores

    inputs = {"input_ids": torch.tensor([prompt(5, 1)])}
    Lift().generate(llama(), None, inputs, max_new_tokens=3, suppress_tokens=[4], do_sample=True, temperature=0.5)


def test_a_processor_serves_plain_generate_and_refuses_other_prompts() -> None:
    model, ids = llama(), prompt(6, 1)
    processor = Penalty().processor(model)
    out = model.generate(torch.tensor([ids]), logits_processor=[processor], max_new_tokens=8, do_sample=False)
    assert out[0, 6:].tolist() == penalised(model, ids, 8)
    with pytest.raises(InputError, match="go on with the prompts"):
        model.generate(torch.tensor([prompt(6, 2)]), logits_processor=[processor], max_new_tokens=2)


def test_padding_that_could_be_text_is_refused_without_a_mask() -> None:
    model = llama()
    model.generation_config.pad_token_id = model.generation_config.bos_token_id = 1
    with pytest.raises(InputError, match="give attention_mask"):
        Penalty().processor(model)(torch.tensor([[1, 5], [6, 7]]), torch.zeros(2, VOCABULARY))


def test_a_rejected_and_redrafted_row_finds_its_state_again() -> None:
    processor = Penalty().processor(llama())
    scores = torch.zeros(1, VOCABULARY)
    for row in ([3, 4], [3, 4, 9, 10, 11], [3, 4, 9, 12]):
        shifted = processor(torch.tensor([row]), scores)
        assert shifted[0].nonzero()[:, 0].tolist() == sorted(row[2:])


def test_no_prompt_and_beams_for_drafters_are_refused() -> None:
    model = llama()
    with pytest.raises(InputError, match="at least one token"):
        Penalty().open(model, [])
    with pytest.raises(InputError, match="without beams"):
        Guess().generate(model, None, {"input_ids": torch.tensor([[3, 4]])}, max_new_tokens=2, num_beams=2)
    right = {"input_ids": torch.tensor([[3, 0]]), "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(InputError, match="padded on the left"):
        Guess().generate(model, None, right)


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    model, inputs = llama(), {"input_ids": torch.tensor([prompt(5, 1)])}
    before = torch.get_rng_state()
    texts = [form(seed=s).generate(model, None, inputs, max_new_tokens=12, do_sample=True).tokens
             for form in (Penalty, Guess, Pairs) for s in (3, 3, 4)]  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())
    for same, again, other in itertools.batched(texts, 3) if hasattr(itertools, "batched") else [texts[:3]]:
        assert same == again != other
