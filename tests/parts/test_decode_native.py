"""The compiled kernels against plain torch: same integers, same step; and life without a compiler."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gossamer.compression.gptq import GPTQ
from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError
from gossamer.decoding.medusa import Medusa
from gossamer.parts import decode_native
from gossamer.parts.decode_native import NativeHalf, NativeWeight, best_path, load_native
from gossamer.parts.decode_own import OwnForward
from gossamer.parts.decode_plan import Matrix
from gossamer.parts.decode_runner import Chunk, Runner, chain
from gossamer.parts.decode_state import tree_from
from gossamer.parts.decode_weights import Codes, IntegerWeight, integer_form, quantise_rows
from gossamer.parts.quant_format import Packing, find_matrices, mark_quantised, pack_matrix
from gossamer.parts.quant_linear import QuantLinear
from gossamer.parts.surgery import Keep, cut, find_blocks
from gossamer.testing.bench import Bench, _text

DENSE = ("llama", "gemma3", "qwen3", "gpt2")
PATHS = ("avx512bf16", "avx512vnni", "avx2", "plain")
TOKENS = [7, 30, 51, 98, 200, 11, 45, 12, 8]
PARENTS = [-1, 0, 0, 1, -1, 4, 3, 2]
NEW = [40, 41, 42, 43, 44, 45, 46, 47]


def runnable() -> list[str]:
    return list(PATHS[PATHS.index(best_path()) :])


@functools.cache
def runner_of(family: str, weights: str, native: str) -> Runner:
    return Runner(Bench(family).model(seed=3), weights=weights, native=native, max_length=160)


def variant(name: str) -> Any:
    shape = _text(2)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = {
            "llama3_with_biases": lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**shape, rope_parameters=rope, attention_bias=True, mlp_bias=True)),
            "mistral_window": lambda: transformers.MistralForCausalLM(
                transformers.MistralConfig(**shape, sliding_window=6)),
            "mixtral_window": lambda: transformers.MixtralForCausalLM(
                transformers.MixtralConfig(**shape, sliding_window=6, num_local_experts=4)),
            "qwen2_window": lambda: transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**shape, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
            "gemma3_capped": lambda: transformers.Gemma3ForCausalLM(
                transformers.Gemma3TextConfig(**shape, sliding_window=6, final_logit_softcapping=3.0,
                                              layer_types=["sliding_attention", "full_attention"])),
            "dynamic_rope": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
                **shape, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        }[name]()  # fmt: skip
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)  # biases and gains that count
    return model.eval()


@pytest.mark.parametrize(
    "name", ["llama3_with_biases", "mistral_window", "mixtral_window", "qwen2_window", "gemma3_capped"]
)
def test_variants_of_the_families(name: str) -> None:
    model = variant(name)
    runner, ids = Runner(model, max_length=64), TOKENS * 4
    assert runner.reason == ""
    state = runner.open()
    mine = [runner.prefill(state, ids[:9]), *(runner.step(state, token) for token in ids[9:])]
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([ids])).logits[0, 8:]
    torch.testing.assert_close(torch.stack(mine), plain, atol=2e-4, rtol=1e-4)


def test_angles_that_change_with_the_length_are_not_planned() -> None:
    runner = Runner(variant("dynamic_rope"), max_length=64)
    assert "dynamic" in runner.reason


def form_of(
    out: int, columns: int, bits: int, *, wide: bool = False, minima: bool = False, bias: bool = False
) -> Codes:
    generator = torch.Generator().manual_seed(out + columns + bits)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (out, columns), generator=generator, dtype=torch.int8)
    shape = (out, columns // 32)
    scales = torch.rand(shape, generator=generator) + 0.1
    return Codes(
        codes,
        scales if wide else scales.bfloat16(),
        torch.randn(shape, generator=generator) if minima else None,
        torch.randn(out, generator=generator) if bias else None,
        bits,
        columns,
    )


def naive(x: Tensor, form: Codes) -> Tensor:
    """The product with restored weights and restored activations, in double precision."""
    codes, scales = quantise_rows(x, form.codes.shape[1])
    near = (codes.double() * scales.double()[..., None]).flatten(1)
    spread = form.scales.double().repeat_interleave(32, 1)
    weight = form.codes.double() * spread
    if form.minima is not None:
        weight = weight + form.minima.double().repeat_interleave(32, 1)
    y = near @ weight.t()
    return y if form.bias is None else y + form.bias.double()


FORMS = {
    "8 bits": {"out": 48, "columns": 96, "bits": 8},
    "4 bits": {"out": 48, "columns": 96, "bits": 4},
    "8 bits, 37 rows, bias": {"out": 37, "columns": 64, "bits": 8, "bias": True},
    "4 bits, 37 rows, minima": {"out": 37, "columns": 64, "bits": 4, "minima": True, "bias": True},
    "8 bits, minima, wide scales": {"out": 16, "columns": 32, "bits": 8, "minima": True, "wide": True},
}


@pytest.mark.parametrize("kind", FORMS)
def test_integer_products(kind: str) -> None:
    form = form_of(**FORMS[kind])
    x = torch.randn(15, form.inputs, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    expected = naive(x, form)
    torch.testing.assert_close(IntegerWeight(form)(x).double(), expected, atol=1e-3, rtol=1e-5)
    for path in runnable():
        library = load_native("require", path)
        assert library is not None
        assert library.calls.gossamer_path() == 3 - PATHS.index(path)
        weight = NativeWeight(form, library)
        y = weight(x)
        torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-5)
        # a row does not depend on its company
        assert all(torch.equal(weight(x[i : i + 1])[0], y[i]) for i in (0, 7, 14))


@pytest.mark.parametrize(("out", "columns", "bias"), [(48, 96, False), (37, 70, True)])
def test_bfloat16_products(out: int, columns: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(out)
    w = torch.randn(out, columns, generator=generator).bfloat16()
    x, b = torch.randn(15, columns, generator=generator), torch.randn(out, generator=generator) if bias else None
    expected = x.bfloat16().double() @ w.double().t() + (0 if b is None else b.double())
    for path in runnable():
        library = load_native("require", path)
        assert library is not None
        weight = NativeHalf(w, b, library)
        y = weight(x)
        torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)
        assert all(torch.equal(weight(x[i : i + 1])[0], y[i]) for i in (0, 7, 14))


@pytest.mark.parametrize("kind", FORMS)
def test_rows_are_the_weights(kind: str) -> None:
    form = form_of(**FORMS[kind])
    library = load_native("require")
    assert library is not None
    numbers = torch.tensor([0, form.codes.shape[0] - 1, 7])
    weight = naive(torch.eye(form.inputs), dataclasses.replace(form, bias=None)).t()[numbers]
    # one activation a row, so that only its own code of 127 enters
    torch.testing.assert_close(IntegerWeight(form).rows(numbers).double(), weight, atol=1e-4, rtol=1e-5)
    assert torch.equal(NativeWeight(form, library).rows(numbers), IntegerWeight(form).rows(numbers))


def test_tied_embeddings_are_the_rows_of_the_head() -> None:
    native, reference = runner_of("gemma3", "int8", "require"), runner_of("gemma3", "int8", "reference")
    assert native.plan is not None
    assert reference.plan is not None
    ids = torch.tensor([5, 9, 300])
    rows = native.plan.embed(ids)
    torch.testing.assert_close(rows, reference.plan.embed(ids))
    plain = Bench("gemma3").model(seed=3).model.embed_tokens(ids)
    assert 0 < (rows - plain).norm() < 0.01 * plain.norm()
    untied = runner_of("llama", "int8", "require")
    assert untied.plan is not None
    assert torch.equal(untied.plan.embed(ids), Bench("llama").model(seed=3).model.embed_tokens(ids))


def test_activations_of_8_bits_are_near() -> None:
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise_rows(x, 96)
    assert codes.abs().max() == 127
    near = (codes * scales[..., None]).flatten(1)
    assert bool(((near[:, :70] - x).abs() <= 0.5001 * scales.repeat_interleave(32, 1)[:, :70]).all())
    assert not near[:, 70:].any()


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, 32, True), (5, 64, True), (4, 32, False), (8, 0, False)])
def test_packed_layers_keep_their_codes(bits: int, group: int, symmetric: bool) -> None:
    layer = QuantLinear(64, 48, bits, group, bias=True, symmetric=symmetric)
    layer.fill(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))
    form = integer_form(Matrix((layer,)), "stored")
    assert form is not None
    weight = form.codes.float() * form.scales.float().repeat_interleave(32, 1)
    if form.minima is not None:
        weight = weight + form.minima.repeat_interleave(32, 1)
    torch.testing.assert_close(weight, layer.dequantised(torch.float32), atol=1e-5, rtol=1e-5)
    assert form.bits == (8 if bits > 4 else 4)


def test_small_groups_are_restored_to_floats() -> None:
    layer = QuantLinear(64, 48, 4, 16)
    assert integer_form(Matrix((layer,)), "int8") is None


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", DENSE)
def test_native_step_is_the_reference(family: str, weights: str) -> None:
    """A code on the edge of rounding may fall to the other side, so the bound is a share of what quantising costs."""
    native, reference = runner_of(family, weights, "require"), runner_of(family, weights, "reference")
    exact = runner_of(family, "float32", "never")
    assert native.native == best_path()
    assert reference.native == ""
    found = {}
    for name, runner in (("native", native), ("reference", reference), ("exact", exact)):
        state = runner.open()
        runner.prefill(state, TOKENS * 2)
        tree = runner.verify(state, NEW, PARENTS, hidden=(0, 1, -1))
        state.keep([0, 2, 7])
        assert tree.hidden is not None
        found[name] = torch.cat((tree.logits.flatten(), tree.hidden[1:].flatten(), runner.step(state, 50)))
    cost = (found["reference"] - found["exact"]).norm()
    assert cost > 0
    assert (found["native"] - found["reference"]).norm() < 0.2 * cost


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_what_surgery_left_of_a_model_is_planned(family: str) -> None:
    """No attention in the first block, no feed in the last, fewer heads and neurons between."""
    model = Bench(family).model(layers=3)
    blocks = find_blocks(model)
    rest = Keep(range(1, blocks[1].head_groups), range(3, blocks[1].neurons))
    cut(model, {0: Keep(head_groups=()), 1: rest, 2: Keep(neurons=())})
    exact = Runner(model, max_length=64)
    assert exact.plan is not None, exact.reason
    lines = exact.plan.describe()
    assert "no attention" in lines[0]
    assert "no feed" in lines[2]
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    state = exact.open()
    found = torch.stack([exact.step(state, token) for token in TOKENS])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    native, reference = (Runner(model, weights="int8", native=way, max_length=64) for way in ("require", "reference"))
    pair = [runner.verify(runner.open(), NEW, PARENTS).logits for runner in (native, reference)]
    cost = (pair[1] - exact.verify(exact.open(), NEW, PARENTS).logits).norm()
    assert (pair[0] - pair[1]).norm() < 0.2 * cost


def test_a_whole_step_of_a_cut_model_runs_on_the_kernels() -> None:
    model = Bench("llama").model(layers=3)
    cut(model, {0: Keep(head_groups=()), 2: Keep(neurons=())})
    native, reference = (Runner(model, weights="int8", native=way, max_length=64) for way in ("require", "reference"))
    assert native.native == best_path()
    exact = Runner(model, max_length=64)
    found = []
    for runner in (native, reference, exact):
        state = runner.open()
        runner.prefill(state, TOKENS)
        runner.verify(state, NEW, PARENTS)
        state.keep([0, 2, 7])
        found.append(runner.step(state, 50))
    assert (found[0] - found[1]).norm() < 0.2 * (found[1] - found[2]).norm()


@pytest.mark.parametrize("family", DENSE)
def test_bfloat16_on_the_kernels_is_as_near_as_the_model_in_bfloat16(family: str) -> None:
    native, exact = runner_of(family, "bfloat16", "require"), runner_of(family, "float32", "never")
    assert native.native == best_path()
    model = Bench(family).model(seed=3).bfloat16()
    with torch.no_grad():
        plain = model(torch.tensor([TOKENS])).logits[0].float()
    mine, wanted = (r.verify(r.open(), TOKENS).logits for r in (native, exact))
    assert (mine - wanted).norm() < 1.1 * (plain - wanted).norm()


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("family", DENSE)
def test_a_path_of_a_tree_gives_the_bits_of_its_tokens_one_by_one(family: str, weights: str) -> None:
    """Wherever its tokens lie among their siblings, before and behind the ends of blocks of keys."""
    runner = runner_of(family, weights, "require")
    for count in range(9, 27):
        state = runner.open()
        runner.prefill(state, (TOKENS * 3)[:count])
        for path in ([0, 2, 7], [0, 1, 3, 6], [4, 5]):
            plain, tree = state.fork(), state.fork()
            single = torch.stack([runner.step(plain, NEW[place]) for place in path])
            assert torch.equal(runner.verify(tree, NEW, PARENTS).logits[path], single)
            tree.keep(path)
            assert torch.equal(runner.step(tree, 50), runner.step(plain, 50))


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("family", DENSE)
def test_chain_company_and_threads_change_no_bit(family: str, weights: str) -> None:
    runner = runner_of(family, weights, "require")
    state = runner.open()
    runner.prefill(state, TOKENS)
    other, chained = state.fork(), state.fork()
    single = torch.stack([runner.step(state, token) for token in NEW])
    assert torch.equal(runner.verify(chained, NEW).logits, single)
    stranger = runner.open()
    tree = tree_from(8, PARENTS, None, None)
    out = runner.run([Chunk(stranger, NEW, tree, "all"), Chunk(other, NEW, chain(8), "all")])
    assert torch.equal(out[1].logits, single)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = runner.open()
        assert torch.equal(torch.stack([runner.prefill(again, TOKENS), runner.step(again, NEW[0])])[1], single[0])
    finally:
        torch.set_num_threads(threads)


def test_biases_reach_the_kernels() -> None:
    model = variant("llama3_with_biases")
    found = []
    for native in ("require", "reference"):
        runner = Runner(model, weights="int8", native=native, max_length=64)
        found.append(runner.prefill(runner.open(), TOKENS))
    exact = Runner(model, max_length=64)
    cost = (found[1] - exact.prefill(exact.open(), TOKENS)).norm()
    assert (found[0] - found[1]).norm() < 0.2 * cost


def test_experts_run_beside_integer_matrices() -> None:
    runner = runner_of("mixtral", "int8", "require")
    assert runner.plan is not None
    assert runner.plan.own_feeds == 2
    exact = runner_of("mixtral", "float32", "never")
    mine, plain = (r.prefill(r.open(), TOKENS) for r in (runner, exact))
    assert 0 < (mine - plain).norm() < 0.1 * plain.norm()


def test_quantised_model_runs_on_its_own_codes() -> None:
    model = Bench("gemma3").model(seed=3)
    for matrix in find_matrices(model, ())[0]:
        pack_matrix(model, matrix, Packing(4, 32), torch.bfloat16)
    mark_quantised(model)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    for native in ("require", "reference", "never"):
        runner = Runner(model, max_length=64, native=native)
        mine = runner.prefill(runner.open(), TOKENS)
        assert (mine - plain).norm() < 0.05 * plain.norm(), native
    half = Runner(model, head="stored", max_length=64)
    assert half._head(torch.ones(1, 64)).dtype == torch.float32
    floats = Runner(model, weights="float32", max_length=64)
    torch.testing.assert_close(floats.prefill(floats.open(), TOKENS), plain, atol=2e-4, rtol=1e-4)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    decode_native._load.cache_clear()
    decode_native._warn.cache_clear()
    yield tmp_path
    decode_native._load.cache_clear()
    decode_native._warn.cache_clear()


def test_without_a_compiler(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh_cache))
    monkeypatch.delenv("CXX", raising=False)
    model = Bench("llama").model(seed=3)
    with pytest.warns(UserWarning, match="torch's operators") as caught:
        runner = Runner(model, weights="int8", max_length=64)
    assert len(caught) == 1
    assert runner.native == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Runner(model, weights="int4", max_length=64)  # says so once
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    assert (runner.prefill(runner.open(), TOKENS) - plain).norm() < 0.05 * plain.norm()
    state = runner.open()
    runner.prefill(state, TOKENS)
    runner.verify(state, NEW, PARENTS)
    state.keep([4, 5])
    with pytest.raises(GossamerError, match="compiler"):
        Runner(model, weights="int8", native="require")
    assert not list(fresh_cache.glob("kernels/*.so"))


def test_second_start_only_loads(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_native("require")
    assert first is not None
    decode_native._load.cache_clear()
    monkeypatch.setattr(decode_native, "_build", lambda *args: pytest.fail("built again"))
    second = load_native("require")
    assert second is not None
    assert second.path == first.path
    assert [path.suffix for path in (fresh_cache / "kernels").iterdir() if path.suffix != ".lock"] == [".so"]


def test_own_forward_is_not_quantised() -> None:
    model = Bench("llama").model(seed=3)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out)
    with pytest.warns(UserWarning, match="not used"):
        runner = Runner(model, weights="int8")
    assert isinstance(runner._backend, OwnForward)


@pytest.mark.filterwarnings("ignore:decoding kernels cannot be built")
def test_a_packed_model_and_its_drafter_work_without_a_compiler(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fresh_cache))
    monkeypatch.delenv("CXX", raising=False)
    bench = Bench("llama")
    data = [bench.inputs(8)]
    model = GPTQ(bits=4, group=32, skip=()).compress(bench.model(), data).model
    system = Medusa(heads=2, steps=2, batch_size=2, length=16, switch_off=False)
    runner = system.bind(model).runner
    assert runner.library is None
    system.fit(Bundle(model, bench.tokenizer()), bench.rows(("text",)))
    state = system.open(model, TOKENS)
    state.room = 10
    while state.room:
        system.step(model, [state])
    assert state.record.guesses
    assert state.tokens == runner.generate(TOKENS, max_new_tokens=10)
