"""Packages: equal outputs in a fresh process, each part off, every harm refused before anything is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import gossamer
from gossamer.cli._chat import base_of
from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError, InputError, OptionError
from gossamer.core.manifest import MANIFEST, read_manifest, seal
from gossamer.hub import packages as opening
from gossamer.pipeline import engine, packages
from gossamer.pipeline.packages import export_package, make_probe, open_package, replay, write_package
from gossamer.pipeline.stage import save_processor
from gossamer.testing.bench import PROMPTS, Bench

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "switch_off": False}
FRESH = """
import json, sys
import gossamer
from gossamer.core.manifest import read_manifest
from gossamer.pipeline.packages import replay
folder, prompt = sys.argv[1:]
model, tokenizer = gossamer.load(folder)
found = replay(model, tokenizer, read_manifest(folder)["probe"])
bundle = gossamer.saved(folder)
found["scores"] = bundle.parts["toxicdetector"].judge(prompt).score
drafter = bundle.parts["medusa"]
state = drafter.open(bundle.model, bundle.processor(prompt)["input_ids"], bundle.processor)
state.room = 8
while state.room:
    drafter.step(bundle.model, [state])
found["drafted"] = state.tokens
print(json.dumps(found))
"""


def kept(bench: Bench, folder: Path, model: Any = None) -> Path:
    """A model and its tokenizer as a folder."""
    (model or bench.model()).save_pretrained(folder)
    save_processor(bench.tokenizer(), folder)
    return folder


def adapted(where: str | Path, **options: Any) -> Bundle:
    """A model with a LoRA that changes it."""
    model, tokenizer = gossamer.load(where)
    system = gossamer.system("lora", rank=2, **options)
    attached = system.attach(model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Bundle(attached, tokenizer, adapters=[system])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 12, 30]])).logits


def greedy(bundle: Bundle) -> list[int]:
    ids = torch.tensor([bundle.processor(PROMPTS[0])["input_ids"]])
    out = bundle.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def resealed(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(seal({**manifest, **changes})))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """Packed weights, an adapter, a drafter and a guard: the package, and the bundle that it was written from."""
    folder, bench = tmp_path_factory.mktemp("whole"), Bench("llama")
    packed = gossamer.compress(bench.model(), "rounding", bits=8).model
    bundle = adapted(kept(bench, folder / "packed", packed))
    for name, rows, options in (("toxicdetector", bench.guard_rows(), {}), ("medusa", bench.rows(("text",)), QUICK)):
        bundle.parts[name] = gossamer.system(name, **options)
        bundle.parts[name].fit(bundle, rows)
    write_package(bundle, folder / "package")
    return folder / "package", bundle


@pytest.fixture
def copied(whole: tuple[Path, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "copied"))


@pytest.fixture(scope="module")
def referring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a model that every installation has."""
    folder = tmp_path_factory.mktemp("referring") / "package"
    write_package(adapted("llama-7m", target_modules=("q_proj",)), folder)
    return folder


def test_a_fresh_process_gives_equal_outputs(whole: tuple[Path, Bundle]) -> None:
    folder, bundle = whole
    command = [sys.executable, "-c", FRESH, str(folder), PROMPTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["prompts"] == 3
    assert found["tokens"] >= 8
    assert found["largest"] < 1e-5
    assert found["scores"] == pytest.approx(bundle.parts["toxicdetector"].judge(PROMPTS[0]).score, abs=1e-6)
    assert found["drafted"] == greedy(bundle)


def test_load_gives_the_model_with_its_adapter_as_any_other_folder(whole: tuple[Path, Bundle]) -> None:
    folder, bundle = whole
    model, tokenizer = gossamer.load(folder)
    assert not model.training
    assert torch.equal(logits(model), logits(bundle.model))
    assert tokenizer(PROMPTS[0])["input_ids"] == bundle.processor(PROMPTS[0])["input_ids"]
    cast, _ = gossamer.load(folder, dtype="bfloat16")
    assert {p.dtype for p in cast.parameters() if p.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("without", "parts", "has_adapter"),
    [
        ((), {"toxicdetector", "medusa"}, True),
        (("medusa",), {"toxicdetector"}, True),
        ("toxicdetector", {"medusa"}, True),
        (("medusa", "toxicdetector"), set(), True),
        (("lora", "medusa", "toxicdetector"), set(), False),
    ],
)
def test_each_part_can_be_left_out(
    without: Any, parts: set[str], has_adapter: bool, whole: tuple[Path, Bundle]
) -> None:
    folder, bundle = whole
    found = gossamer.saved(folder, without=without)
    assert set(found.parts) == parts
    if has_adapter:
        assert torch.equal(logits(found.model), logits(bundle.model))
    else:
        with bundle.model.disable_adapter():
            assert torch.equal(logits(found.model), logits(bundle.model))
        assert found.adapters == []


def test_unknown_parts_and_parts_that_cannot_stay_are_refused(whole: tuple[Path, Bundle]) -> None:
    with pytest.raises(OptionError, match="without 'medsa': must name one of its parts; did you mean 'medusa'"):
        open_package(whole[0], ("medsa",))
    with pytest.raises(OptionError, match="got medusa still in; leave out lora, toxicdetector, medusa"):
        open_package(whole[0], ("lora", "toxicdetector"))
    with pytest.raises(OptionError, match="must be given for a package alone"):
        gossamer.saved(whole[0].parent / "packed", without=("lora",))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_change_in_any_file_is_refused_before_anything_is_loaded(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(opening, "load_model", never)
    with pytest.raises(AssertionError, match="loaded"):
        open_package(copied)
    for path in [path for path in sorted(copied.rglob("*")) if path.is_file()]:
        before = path.read_bytes()
        for harm in (flipped, Path.unlink):
            harm(path)
            for opened in (gossamer.load, gossamer.saved, open_package):
                with pytest.raises(InputError):
                    opened(copied)
        path.write_bytes(before)
    for name in ("model/weights.bin", "adapter/adapter_model.bin", "model/modeling.py", "setup.py", "config.json"):
        (copied / name).write_text("import os")
        with pytest.raises(InputError, match=r"1 more, .*; remove it"):
            gossamer.load(copied)
        (copied / name).unlink()


def test_another_version_is_refused(copied: Path) -> None:
    resealed(copied, version=2)
    with pytest.raises(InputError, match="must be of version 1, got 2; write the package again"):
        gossamer.load(copied)


def test_a_probe_that_the_model_does_not_meet_is_an_error(whole: tuple[Path, Bundle]) -> None:
    folder, bundle = whole
    probe = read_manifest(folder)["probe"]
    with bundle.model.disable_adapter(), pytest.raises(GossamerError, match="model: must add the tokens"):
        replay(bundle.model, bundle.processor, probe)
    prompts = [(row, row["log_probs"][: len(row["ids"]) - 1]) for row in probe["rows"]]
    moved = [
        {**row, "tokens": [], "sure": 0, "log_probs": [value + 0.01 for value in values]} for row, values in prompts
    ]
    with pytest.raises(GossamerError, match=r"change no log-probability by more than 0\.001, got 0\.01"):
        replay(bundle.model, bundle.processor, {**probe, "rows": moved})
    other = Bench("clip").processor().tokenizer
    other.add_tokens(["number of"])
    with pytest.raises(GossamerError, match="tokenizer: must cut the prompts as before"):
        replay(bundle.model, other, probe)


def test_a_base_that_is_installed_is_referred_to(referring: Path) -> None:
    manifest = read_manifest(referring)
    assert manifest["base"]["name"] == "llama-7m"
    assert manifest["licences"] == {"llama-7m": "Apache-2.0"}
    assert not (referring / "model").exists()
    config = json.loads((referring / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama-7m"
    model, tokenizer = gossamer.load(referring)
    assert replay(model, tokenizer, manifest["probe"])["largest"] == 0
    plain = open_package(referring, ("lora",))
    assert torch.equal(logits(plain.model), logits(gossamer.load("llama-7m")[0]))
    assert base_of(str(referring)) == "llama-7m"


def test_another_model_of_that_name_is_refused(
    referring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(Bench("llama"), tmp_path / "llama-7m")
    monkeypatch.chdir(tmp_path)  # a folder goes before a packaged name
    with pytest.raises(InputError, match=r"base 'llama-7m': must be the model that the package was made with"):
        gossamer.load(referring)


def test_a_base_that_is_nowhere_is_named(referring: Path, tmp_path: Path) -> None:
    shutil.copytree(referring, tmp_path / "package")
    resealed(tmp_path / "package", base={"name": "llama-8m", "fingerprint": "0"})
    with pytest.raises(InputError, match="model 'llama-8m': must be found"):
        gossamer.load(tmp_path / "package")


def test_a_base_is_copied_where_asked_and_where_one_number_differs(tmp_path: Path) -> None:
    model, tokenizer = gossamer.load("llama-7m")
    assert write_package(Bundle(model, tokenizer), tmp_path / "same")["base"]["name"] == "llama-7m"
    manifest = write_package(Bundle(model, tokenizer), tmp_path / "copy", keep_base=True)
    assert manifest["base"]["name"] is None
    assert "model/model.safetensors" in manifest["files"]
    with torch.no_grad():
        model.lm_head.weight[77, 7] += 1
    manifest = write_package(Bundle(model, tokenizer), tmp_path / "changed")
    assert manifest["base"]["name"] is None
    assert torch.equal(gossamer.load(tmp_path / "changed")[0].lm_head.weight, model.lm_head.weight)


def test_a_plain_model_that_is_not_the_one_under_the_adapter_is_noticed(tmp_path: Path) -> None:
    bundle = adapted(kept(Bench("llama"), tmp_path / "base"))
    with torch.no_grad():
        bundle.model.get_base_model().lm_head.weight.mul_(-1)
    with pytest.raises(GossamerError, match="model: must"):
        write_package(bundle, tmp_path / "package")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    bundle.model.get_base_model().config._name_or_path = bundle.model.get_base_model().name_or_path = ""
    with pytest.raises(InputError, match="must have a name or a folder"):
        write_package(bundle, tmp_path / "package")


@pytest.mark.parametrize("name", ["save_bundle", "files_of", "write_json", "open_package", "replay"])
def test_a_write_that_fails_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packages, name, full)
    bench = Bench("llama")
    with pytest.raises(GossamerError, match="No space left"):
        write_package(bench.bundle(), tmp_path / "out" / "package")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_not_written_over(whole: tuple[Path, Bundle], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a new folder, got one with files in it"):
        write_package(whole[1], whole[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a new folder"):
        write_package(whole[1], tmp_path / "file")


def test_a_drafter_that_reads_the_blocks_goes_with_its_plain_model(tmp_path: Path) -> None:
    bench = Bench("gemma3")
    bundle = bench.bundle()
    drafter = gossamer.system("clover", **QUICK)
    drafter.fit(bundle, bench.rows(("text",)))
    bundle.parts["clover"] = drafter
    write_package(bundle, tmp_path / "package")
    found = open_package(tmp_path / "package")
    drafted = found.parts["clover"].generate(found.model, found.processor, PROMPTS[0], max_new_tokens=8).tokens[0]
    assert drafted == greedy(bundle)
    assert open_package(tmp_path / "package", "clover").parts == {}


def test_models_that_a_part_runs_come_along(tmp_path: Path) -> None:
    bench = Bench("llama")
    bundle, pair = bench.bundle(), {"expert": bench.bundle(seed=1), "anti": bench.bundle(seed=2)}
    bundle.parts["proxy_tuning"] = gossamer.system("proxy_tuning", anti_expert="anti", companions=pair)
    manifest = write_package(bundle, tmp_path / "package")
    assert manifest["companions"]["expert"]["name"] is None
    found = open_package(tmp_path / "package")
    steered = found.parts["proxy_tuning"].generate(found.model, found.processor, PROMPTS[0], max_new_tokens=8)
    expected = bundle.parts["proxy_tuning"].generate(bundle.model, bundle.processor, PROMPTS[0], max_new_tokens=8)
    assert steered.tokens == expected.tokens
    assert steered.tokens[0] != greedy(bundle)
    assert greedy(open_package(tmp_path / "package", "proxy_tuning")) == greedy(bundle)
    bundle.parts["proxy_tuning"].companions["anti"] = bench.model(seed=2)
    with pytest.raises(InputError, match="companion 'anti': must come with its tokenizer"):
        write_package(bundle, tmp_path / "other")


def test_an_adapter_of_hooks_comes_along(tmp_path: Path) -> None:
    model, tokenizer = gossamer.load(kept(Bench("llama"), tmp_path / "base"))
    system = gossamer.system("pat", inner=4)
    bundle = Bundle(system.attach(model).eval(), tokenizer, adapters=[system])
    write_package(bundle, tmp_path / "package")
    found = open_package(tmp_path / "package")
    assert torch.equal(logits(found.model), logits(bundle.model))


def test_an_adapter_that_sees_brings_its_eyes(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    Bench("vit").model(layers=4).save_pretrained(tmp_path / "tower")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tower")
    eyes, _ = gossamer.load(tmp_path / "tower")
    model, tokenizer = gossamer.load(kept(Bench("llama"), tmp_path / "base"))
    options = {"vision": "eyes", "visual_every": 2, "visual_adapter": "none"}
    system = gossamer.system("lavin", companions={"eyes": eyes}, **options)
    bundle = Bundle(system.attach(model).eval(), system.processor(tokenizer), adapters=[system])
    manifest = write_package(bundle, tmp_path / "package")
    assert "companions/eyes/model.safetensors" in manifest["files"]
    shutil.rmtree(tmp_path / "tower")
    found = open_package(tmp_path / "package")
    rows = [{"image": Image.new("RGB", (16, 16), (200, 0, 0)), "instruction": "say it", "answer": "red"}]
    losses = [one.model(**one.processor.collate(one.processor.examples(rows))).loss for one in (bundle, found)]
    assert torch.equal(*losses)


def test_an_accelerated_model_is_accelerated_again_or_not(tmp_path: Path) -> None:
    bench = Bench("llava")
    tokenizer = bench.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    bundle, inputs = Bundle(bench.model(layers=4), LlavaProcessor(images, tokenizer, patch_size=8)), bench.inputs()
    plain = bundle.model(**inputs).logits
    system = gossamer.system("pyramiddrop")
    bundle.model, bundle.processor = system.accelerate(bundle.model, bundle.processor)
    bundle.parts["pyramiddrop"] = system
    fast = bundle.model(**inputs).logits
    write_package(bundle, tmp_path / "package")
    assert torch.allclose(gossamer.load(tmp_path / "package")[0](**inputs).logits, fast, atol=1e-6)
    without = open_package(tmp_path / "package", "pyramiddrop").model(**inputs).logits
    assert torch.allclose(without, plain, atol=1e-6)
    assert not torch.allclose(without, fast)


def test_a_model_that_writes_no_text_has_no_probe(tmp_path: Path) -> None:
    bundle = Bench("bert").bundle()
    assert write_package(bundle, tmp_path / "package")["probe"] is None
    again, _ = gossamer.load(tmp_path / "package")
    ids = torch.tensor([[5, 9, 12]])
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, bundle.model.eval()(ids).last_hidden_state)


def test_greedy_text_is_sure_up_to_where_two_tokens_are_close() -> None:
    bundle = Bench("llama").bundle()
    whole = make_probe(bundle.model, bundle.processor)
    with torch.no_grad():
        bundle.model.lm_head.weight.mul_(1e-4)
    flat = make_probe(bundle.model, bundle.processor)
    assert whole is not None
    assert flat is not None
    assert all(row["sure"] for row in whole["rows"])
    assert not any(row["sure"] for row in flat["rows"])
    assert replay(bundle.model, bundle.processor, flat)["tokens"] == 0


def test_a_model_of_nan_is_neither_written_nor_taken_for_equal(tmp_path: Path) -> None:
    bundle = Bench("llama").bundle()
    probe = make_probe(bundle.model, bundle.processor)
    assert probe is not None
    unsure = {**probe, "rows": [{**row, "sure": 0} for row in probe["rows"]]}
    assert replay(bundle.model, bundle.processor, unsure)["largest"] == 0
    with torch.no_grad():
        bundle.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(GossamerError, match="must give finite log-probabilities"):
        write_package(bundle, tmp_path / "package")
    with pytest.raises(GossamerError, match=r"change no log-probability by more than 0\.001, got nan"):
        replay(bundle.model, bundle.processor, unsure)


@pytest.fixture(scope="module")
def run(rows_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    steps: list[Any] = [
        {"trim_vocabulary": {"corpus": "data"}},
        {"mos": {"rank": 4, "budget": 2, "private": 1, "shards": 2}},
        {"train": {"objective": "sft", "optimizer": "adamw", "steps": 1, "batch_size": 2, "max_length": 48}},
    ]
    data = {"path": rows_path, "test": 4, "validation": 3}
    engine.run({"model": "llama-7m", "data": data, "steps": steps}, out=folder)
    return folder


def test_a_run_becomes_a_package_with_lineage_and_claims(run: Path, tmp_path: Path) -> None:
    found = export_package(run, tmp_path / "package")
    manifest = read_manifest(tmp_path / "package")
    assert [record["step"] for record in manifest["lineage"]] == ["trim_vocabulary", "mos", "train"]
    assert manifest["base"]["name"] is None  # its vocabulary was trimmed
    assert set(manifest["claims"]) == {"mos"}  # baselines claim nothing
    assert manifest["claims"]["mos"]["status"] in ("shown", "not_shown", "stale", "recheck")
    assert isinstance(manifest["claims"]["mos"]["effect"], float)
    assert manifest["licences"] == {"llama-7m": "Apache-2.0"}
    assert {"gossamer", "torch", "transformers"} <= set(manifest["versions"])
    assert str(run) not in (tmp_path / "package" / MANIFEST).read_text()
    assert (found["sha256"], found["adapters"], found["round_trip"]) == (
        manifest["sha256"], ["mos"], "same greedy tokens",
    )  # fmt: skip
    assert torch.equal(logits(gossamer.load(tmp_path / "package")[0]), logits(gossamer.saved(run).model.eval()))


def test_the_same_run_gives_the_same_package(run: Path, tmp_path: Path) -> None:
    one, other = (write_package(run, tmp_path / folder / "package") for folder in ("one", "two"))
    assert one["sha256"] == other["sha256"]
    assert write_package(run / "result", tmp_path / "three" / "package")["sha256"] == one["sha256"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold bundle\.json; give the folder of a run"):
        write_package(tmp_path, tmp_path / "package")


def test_a_recipe_does_not_start_from_a_package(referring: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got a package \(manifest\.json\); open it with gossamer\.load"):
        engine.run({"model": str(referring), "steps": []}, out=tmp_path / "run")


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from gossamer.cli import main; main()", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_verifies_a_package(copied: Path) -> None:
    done = check(str(copied), "--replay", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parts"] == ["medusa", "toxicdetector"]
    assert found["replay"]["largest"] < 1e-5
    flipped(copied / "model" / "model.safetensors")
    done = check(str(copied))
    assert done.returncode == 2
    assert "model.safetensors: must be as it was written" in done.stderr
    assert "Traceback" not in done.stderr
