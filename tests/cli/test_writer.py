"""What the verbs that talk to a model print: transformers' own greedy text, and samples that a seed repeats."""

from __future__ import annotations

from gossamer.cli._models import Writer
from gossamer.core.bundle import Bundle
from gossamer.decoding.prompt_lookup import PromptLookup
from gossamer.testing.bench import Bench


def test_greedy_text_is_that_of_generate(capsys):
    bench = Bench("llama")
    model, tokenizer = bench.model(), bench.tokenizer()
    inputs = tokenizer("The rain in", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    wanted = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert Writer(Bundle(model, tokenizer)).write("The rain in", 12, temperature=0.0, seed=0) == wanted
    assert capsys.readouterr().out.strip() == wanted.strip()


def test_samples_follow_the_seed_and_the_checkpoint_s_own_cuts():
    bench = Bench("llama")
    model, tokenizer = bench.model(), bench.tokenizer()
    model.generation_config.top_k = 0
    free = [Writer(Bundle(model, tokenizer)).write("The rain", 20, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert free[0] == free[1] != free[2]
    model.generation_config.top_k = 1
    cut = Writer(Bundle(model, tokenizer)).write("The rain", 20, temperature=2.0, seed=1)
    assert cut == Writer(Bundle(model, tokenizer)).write("The rain", 20, temperature=0.0, seed=1)


def test_a_decoding_system_of_the_bundle_writes_the_same_text():
    bench = Bench("llama")
    model, tokenizer = bench.model(), bench.tokenizer()
    text = "One two one two one two one"
    plain = Writer(Bundle(model, tokenizer)).write(text, 16, temperature=0.0, seed=0)
    system = PromptLookup(switch_off=False)
    assert Writer(Bundle(model, tokenizer, {"prompt_lookup": system})).write(text, 16, temperature=0.0, seed=0) == plain


def test_copies_on_the_kernels_change_no_token():
    bench = Bench("llama")
    model, tokenizer = bench.model().bfloat16(), bench.tokenizer()
    text = "One two one two one two one"
    writer = Writer(Bundle(model, tokenizer))
    assert isinstance(writer.decoder, PromptLookup)
    for temperature in (0.0, 1.5):
        copied = writer.write(text, 24, temperature, seed=3)
        choice = writer._choice(temperature, 3)
        ids = tokenizer(text)["input_ids"]
        plain = list(writer.runner.stream(ids, max_new_tokens=24, eos=writer.ends, choice=choice))
        assert copied == tokenizer.decode(plain, skip_special_tokens=True)
    assert Writer(Bundle(bench.model(), tokenizer)).decoder is None
