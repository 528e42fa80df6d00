"""ZipLM: removal equals the least-squares refit, the search its brute force, and cut models cost what was planned."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from gossamer.compression.ziplm import Run, ZipLM
from gossamer.compression.ziplm.costs import Costs, counted, head_counts, isotonic, measured
from gossamer.compression.ziplm.removal import ffn_widths, level_of, remove_units, unit_scores
from gossamer.compression.ziplm.search import even, search, solve
from gossamer.compression.ziplm.tuning import Distillation, token_loss
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.calibration import collect
from gossamer.parts.surgery import find_blocks
from gossamer.testing.bench import Bench, output

QUICK = {"search_starts": 3, "search_steps": 6}


def problem(units: int, width: int, out: int = 5, tokens: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """(W, X [tokens, in], H), float64, with inputs that go together."""
    generator = torch.Generator().manual_seed(units + width)
    columns = units * width
    mix = torch.randn(columns, columns, generator=generator).double() / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator).double() @ mix
    return torch.randn(out, columns, generator=generator).double(), x, 2 / tokens * x.T @ x


def refit(weight: Tensor, x: Tensor, keep: list[int]) -> Tensor:
    """The weights on the kept inputs whose outputs are nearest to those of ``weight``: plain least squares."""
    return torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T


def columns(units: list[int], width: int) -> list[int]:
    return [unit * width + place for unit in units for place in range(width)]


def distance(weight: Tensor, x: Tensor, keep: list[int], left: Tensor) -> float:
    return float((x @ weight.T - x[:, keep] @ left.T).square().sum())


def naive(weight: Tensor, x: Tensor, width: int) -> list[tuple[list[int], Tensor]]:
    """Greedy removal by trying every unit and fitting anew each time: (units left, weights) after each removal."""
    units, steps = list(range(weight.shape[1] // width)), []
    while len(units) > 1:
        tries = []
        for unit in units:
            rest = [other for other in units if other != unit]
            left = refit(weight, x, columns(rest, width))
            tries.append((distance(weight, x, columns(rest, width), left), rest, left))
        _, units, left = min(tries, key=lambda one: one[0])
        steps.append((units, left))
    return steps


@pytest.mark.parametrize("width", [1, 4])
def test_one_removal_is_the_least_squares_refit_and_costs_rho(width: int) -> None:
    weight, x, hessian = problem(6, width)
    level = remove_units(weight, hessian, width, {5})[5]
    scores = unit_scores(weight, torch.linalg.inv(hessian), width)
    gone = int(scores.argmin())
    assert level.keep.tolist() == [unit for unit in range(6) if unit != gone]
    kept = columns(level.keep.tolist(), width)
    torch.testing.assert_close(level.weight, refit(weight, x, kept), rtol=1e-10, atol=1e-10)
    # H = 2/n X^T X, so that rho is 2/n of the squared error
    error = distance(weight, x, kept, level.weight)
    assert float(scores.min()) == pytest.approx(2 / len(x) * error, rel=1e-10)
    assert level.error == pytest.approx(error / float((x @ weight.T).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("units", "width"), [(12, 1), (5, 3)])
def test_the_whole_way_is_the_naive_greedy_one(units: int, width: int) -> None:
    weight, x, hessian = problem(units, width)
    levels = remove_units(weight, hessian, width, set(range(units + 1)))
    assert torch.equal(levels[units].weight, weight)
    assert levels[units].error == 0
    assert levels[0].error == 1
    assert levels[0].weight.shape == (5, 0)
    for left, fitted in naive(weight, x, width):
        assert levels[len(left)].keep.tolist() == left
        torch.testing.assert_close(levels[len(left)].weight, fitted, rtol=1e-8, atol=1e-8)


def test_a_copy_of_an_input_goes_first_and_for_free() -> None:
    """A ranking by size alone would keep both."""
    weight, x, _ = problem(8, 1)
    weight[:, 3] *= 50
    x[:, 6] = x[:, 3] + 1e-4 * x[:, 0]
    level = remove_units(weight, 2 / len(x) * x.T @ x, 1, {7})[7]
    assert len({3, 6} & set(level.keep.tolist())) == 1
    assert level.error < 1e-6


def test_dead_inputs_go_first_and_singular_hessians_are_damped() -> None:
    weight, x, _ = problem(10, 1, tokens=6)
    x[:, 4] = 0
    levels = remove_units(weight, 2 / len(x) * x.T @ x, 1, {9, 5})
    assert 4 not in levels[9].keep.tolist()
    assert levels[9].error == 0
    assert torch.isfinite(levels[5].weight).all()
    assert levels[5].error < 0.2


def test_levels_of_an_ffn() -> None:
    widths = ffn_widths(1536, 0.9)
    assert widths[:4] == [1536, 1382, 1244, 1120]
    assert widths[-1] == 0
    assert widths[-2] > 0.01 * 1536 > 0.9 * widths[-2] - 1
    assert 40 < len(widths) < 48
    assert ffn_widths(4, 0.5) == [4, 2, 1, 0]


def test_programming_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    errors = [np.sort(generator.random(5)) for _ in range(4)]
    costs = [np.append(np.sort(generator.integers(0, 2000, 4))[::-1], 0).astype(float) for _ in range(4)]
    for budget in (2000.0, 3500.0, 5000.0):
        ways = [
            (sum(e[i] for e, i in zip(errors, way, strict=True)), way)
            for way in itertools.product(range(5), repeat=4)
            if sum(c[i] for c, i in zip(costs, way, strict=True)) <= budget
        ]
        found = solve(errors, costs, budget)
        assert found is not None
        total = sum(e[i] for e, i in zip(errors, found, strict=True))
        assert total == pytest.approx(min(ways)[0], rel=0.02)
        assert sum(c[i] for c, i in zip(costs, found, strict=True)) <= budget * (1 + 1e-6)
    assert solve(errors, [cost + 600 for cost in costs], 2000.0) is None
    assert solve(errors, [np.array([1.0, 0, 0, 0, 0])] * 4, 0.0) is not None


def test_the_search_goes_by_the_real_loss() -> None:
    """The prior says level 1 of the first matrix, the loss says that of the second."""
    errors, costs = [np.array([0.0, 0.1]), np.array([0.0, 0.2])], [np.array([1.0, 0.0])] * 2
    found = search(lambda way: float(way[0]), errors, costs, 1.0, starts=20, steps=5, mutate=0.5, seed=0)
    assert found is not None
    assert found.levels == (0, 1)
    assert found.scored == 2


def test_isotonic_averages_neighbours_in_the_wrong_order() -> None:
    assert isotonic([1, 3, 2, 5]) == [1, 2.5, 2.5, 5]
    assert isotonic([3, 2, 1]) == [2, 2, 2]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("metric", ["params", "memory"])
def test_a_cut_model_costs_what_was_planned(family: str, metric: str) -> None:
    bench = Bench(family)
    model = bench.model()
    data = [bench.inputs(3), bench.inputs(2)]
    before = size(model, metric)
    done = ZipLM(metric=metric, targets=(1.6,), **QUICK).compress(model, data)
    after = size(model, metric)
    assert done.report.values["predicted"] == pytest.approx(before / after, rel=1e-6)
    # the table of a model that was cut before is that of its present widths
    assert counted(model, (1, 128), *widths_of(model), memory=metric == "memory").whole == after
    assert before / after >= 1.6
    assert done.report.values["loss"] >= 0


def size(model: Any, metric: str) -> int:
    """Parameters; or bytes of them and, of a decoder, of keys and values of 128 tokens."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if metric == "params":
        return count
    pairs = sum(block.kv_heads * block.head_width for block in find_blocks(model)) if model.can_generate() else 0
    return 4 * (count + 2 * 128 * pairs)


def widths_of(model: Any) -> tuple[set[Any], set[int]]:
    blocks = find_blocks(model)
    return {count for block in blocks for count in head_counts(block)}, {block.neurons for block in blocks} | {0}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_cut_model_has_the_loss_that_the_search_saw(family: str) -> None:
    bench = Bench(family)
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    run = Run(ZipLM(metric="params", targets=(2.0,), **QUICK), model, data)
    report = run.reach(2.0)
    assert run.loss(model) == pytest.approx(report.values["loss"], rel=1e-4)
    assert report.values["loss"] != report.values["loss_before"]


def test_updates_lower_the_error_of_every_layer() -> None:
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    for block in find_blocks(model):
        (_, statistics), weight = next(collect(model, data, [block.down_path])), block.module.mlp.down_proj.weight
        hessian = statistics.hessian
        level = remove_units(weight.detach(), hessian, 1, {80})[80]
        largest = weight.detach().square().sum(0).topk(80).indices.sort().values
        assert level.error < level_of(weight.detach(), hessian, 1, level.keep).error
        assert level.error < level_of(weight.detach(), hessian, 1, largest).error


def test_latency_is_measured_kept_and_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    done = ZipLM(targets=(1.1,), levels_ffn=0.5, shape=(2, 16), **QUICK).compress(model, data)
    assert done.report.values["predicted"] >= 1.1
    assert len(list(tmp_path.glob("latency/*.json"))) == 1
    again = bench.model()
    ZipLM(targets=(1.1,), levels_ffn=0.5, shape=(2, 16), **QUICK).compress(again, data)
    assert len(list(tmp_path.glob("latency/*.json"))) == 1
    with torch.no_grad():
        assert torch.equal(output(model, data[0]), output(again, data[0]))


def test_shape_is_what_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    model = Bench("llama").model()
    small, large = (measured(model, shape, [(4, 2), (0, 0)], [128, 0]) for shape in ((1, 2), (8, 200)))
    assert large.whole > 3 * small.whole
    assert large.neurons[128] > small.neurons[128]
    assert large.heads[0, 0] == large.neurons[0] == 0
    with pytest.raises(InputError, match="at most the 256 tokens"):
        measured(model, (1, 300), [(4, 2), (0, 0)], [128, 0])


def test_timing_comes_from_a_file(tmp_path: Path) -> None:
    """Heads that cost all and neurons that cost nothing: only heads go."""
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    path = tmp_path / "table.json"
    neurons = dict.fromkeys(ffn_widths(128, 0.9), 0.0)
    Costs(10.0, {(4, 2): 4.0, (2, 1): 2.0, (0, 0): 0.0}, neurons).save(path)
    report = ZipLM(timing=str(path), targets=(1.6,), metric="params", **QUICK).compress(model, data).report
    assert report.values["widths"]["neurons"] == [128, 128]
    assert report.values["widths"]["heads"] in ([2, 2], [4, 0], [0, 4])
    assert report.values["predicted"] == pytest.approx(10 / 6)
    with pytest.raises(InputError, match="must have a cost for every width"):
        ZipLM(timing=str(path), levels_ffn=0.5).compress(bench.model(), data)
    for text in ("{}", "no table"):
        path.write_text(text)
        with pytest.raises(InputError, match="must be a table of costs"):
            ZipLM(timing=str(path)).compress(bench.model(), data)


def test_a_target_beyond_reach_says_the_most(tmp_path: Path) -> None:
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    before = copy.deepcopy(model)
    with pytest.raises(OptionError, match=r"targets: must be at most \d+\.\d\d, .*got 1000"):
        ZipLM(targets=(1000.0,), metric="params", **QUICK).compress(model, data)
    with torch.no_grad():
        assert torch.equal(output(model, data[0]), output(before, data[0]))


def test_bad_data_and_options_are_refused() -> None:
    bench = Bench("llama")
    data = [bench.inputs(3)]
    for wrong in (None, [], [{"input_ids": torch.arange(4, 9)[None]}]):
        with pytest.raises(InputError, match="calibration data: must hold"):
            ZipLM().compress(bench.model(), wrong)
    for options in (
        {"targets": ()},
        {"targets": (2.0, 1.5)},
        {"shape": (1,)},
        {"distil": (1.0,)},
        {"distil": (0, 0, 0)},
    ):
        with pytest.raises(OptionError, match=f"ziplm.{next(iter(options))}: must be"):
            ZipLM(**options).compress(bench.model(), data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="known layout"):
        ZipLM().compress(Bench("mixtral").model(), data)
    encoder = Bench("bert")
    with pytest.raises(InputError, match="must have a task to learn"):
        ZipLM(tune_steps=1, distil=(1.0, 0, 0), metric="params").compress(encoder.model(), [encoder.inputs(8)])


def test_one_shot_family_shares_levels_and_leaves_the_model(tmp_path: Path) -> None:
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    before = copy.deepcopy(model)
    system = ZipLM(targets=(1.2, 1.8), metric="params", **QUICK)
    members = list(system.family(model, data))
    with torch.no_grad():
        assert torch.equal(output(model, data[0]), output(before, data[0]))
        alone = system.compress(bench.model(), data).model
        assert torch.equal(output(alone, data[0]), output(members[1].model, data[0]))
    assert [member.report.values["target"] for member in members] == [1.2, 1.8]
    assert members[1].report.bytes_after < members[0].report.bytes_after < members[0].report.bytes_before
    members[1].model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(output(loaded, data[0]), output(members[1].model, data[0]))


def classifier() -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=3,
                        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_gradual_distils_between_targets() -> None:
    model = classifier()
    ids = torch.randint(4, 64, (16, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[::2, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        batch["labels"] = model(**batch).logits.argmax(-1)
    before = copy.deepcopy(model)
    system = ZipLM(targets=(1.3, 2.0), metric="params", tune_steps=40, tune_rate=3e-3, distil=(0.0, 1.0, 0.5), **QUICK)
    sizes, curves = [], []
    for member in system.family(model, [batch]):
        sizes.append(member.report.bytes_after)
        curves.append(member.report.values["tuning"])
    assert sizes[1] < sizes[0] < member.report.bytes_before
    for curve in curves:
        assert sum(curve[-5:]) < 0.8 * sum(curve[:5]), curve
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_token_loss_is_without_padding_and_relative() -> None:
    student, teacher = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    terms = []
    for layer in (1, 2):
        places = [(b, t) for b in range(2) for t in range(5) if mask[b, t]]
        apart = sum(float((student[layer, b, t] - teacher[layer, b, t]).square().sum()) for b, t in places)
        terms.append(apart / sum(float(teacher[layer, b, t].square().sum()) for b, t in places))
    assert float(token_loss(student, teacher, mask)) == pytest.approx(sum(terms) / 2, rel=1e-5)
    student[:, 0, 3:] += 100
    assert float(token_loss(student, teacher, mask)) == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_distillation_of_a_model_into_itself_is_zero() -> None:
    model = classifier()
    objective = Distillation(model, (0.0, 1.0, 0.5))
    rows = [{"input_ids": torch.arange(4, 10), "attention_mask": torch.ones(6).long()},
            {"input_ids": torch.arange(4, 8), "attention_mask": torch.ones(4).long()}]  # fmt: skip
    batch = objective.collate(rows, None)
    assert batch["attention_mask"].sum() == objective.amount(batch) == 10
    assert float(objective.loss(model, batch).value.detach()) == pytest.approx(0, abs=1e-6)


def test_an_error_is_worth_what_it_costs_among_the_cuts_of_the_target() -> None:
    bench = Bench("llama")
    model, data = bench.model(), [bench.inputs(3), bench.inputs(2)]
    run = Run(ZipLM(metric="params", **QUICK), copy.deepcopy(model), data)
    levels = run.levels()
    start = run.even(levels, 1.2)
    shares = [matrix.units[level] / matrix.units[0] for matrix, level in zip(levels, start, strict=True)]
    assert 0 < min(shares) <= max(shares) < 1
    slopes = []
    for number, (matrix, level) in enumerate(zip(levels, start, strict=True)):
        more, fewer = matrix.around(level)
        assert matrix.units[more] > matrix.units[fewer]
        losses = []
        for place in (more, fewer):
            other = copy.deepcopy(model)
            for at, (one, usual) in enumerate(zip(levels, start, strict=True)):
                kept = one.levels[place if at == number else usual]
                weight = other.get_submodule(one.path).weight
                with torch.no_grad():
                    weight.zero_()
                    weight[:, columns(kept.keep.tolist(), one.width)] = kept.weight
            losses.append(run.loss(other))
        slopes.append((losses[1] - losses[0]) / (matrix.levels[fewer].error - matrix.levels[more].error))
    wanted = []
    for matrix, slope in zip(levels, slopes, strict=True):
        alike = [max(s, 0.0) for s, other in zip(slopes, levels, strict=True) if other.kind == matrix.kind]
        least = 0.3 * (sum(alike) / len(alike) or sum(max(s, 0.0) for s in slopes) / len(slopes) or 1.0)
        wanted.append(max(slope, least))
    assert run._scales(levels, start) == pytest.approx(wanted, rel=1e-3)
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_even_levels_are_the_largest_density_that_fits() -> None:
    units, costs = [[4, 2, 0], [10, 7, 5, 0]], [np.array([4.0, 2.0, 0.0]), np.array([10.0, 7.0, 5.0, 0.0])]

    def nearest(density: float) -> tuple[int, ...]:
        return tuple(min(range(len(left)), key=lambda s: abs(left[s] / left[0] - density)) for left in units)

    def spent(levels: tuple[int, ...]) -> float:
        return sum(cost[level] for cost, level in zip(costs, levels, strict=True))

    fitting = [levels for levels in (nearest(d / 100) for d in range(101)) if spent(levels) <= 9]
    assert even(units, costs, 9) == fitting[-1] == (1, 1)
    assert even(units, costs, 0) == (2, 3)
    assert even(units, costs, -1) is None
