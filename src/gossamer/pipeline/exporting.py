"""Export: a model in the format of others, built beside its place, proved there, and moved in only if the proof holds.

gguf         one file for llama.cpp: f16, q8_0 or q4_0, with tokenizer and chat template
onnx         a folder with model.onnx, float32, for ONNX Runtime; decoders with their cache
safetensors  a folder that transformers loads without Gossamer: bf16, f16 or f32
peft         the attached adapter as a folder that PEFT loads without Gossamer: plain LoRA wherever it is low-rank
package      everything, with a manifest: :mod:`gossamer.pipeline.packages`, which has a proof of its own

The proof compares with the model as it was handed in, adapter and packed weights included, computing in float32 on the
weights that it has. Bounds are top-1 agreement, KL and the largest change of a log-probability at 640 positions; of
an encoder, the largest change of a sentence vector's entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError, InputError, OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, atomic_file
from gossamer.kinds.acceleration import Acceleration
from gossamer.parts import export_gguf, export_onnx, export_plain, export_proof
from gossamer.parts.export_gguf_proof import prove_gguf
from gossamer.parts.export_gguf_tokens import read_tokens
from gossamer.parts.export_proof import TEXTS, Bound, Reference, prove, prove_equal
from gossamer.parts.generation import end_ids, greedy_config, left_pad
from gossamer.parts.roundtrip import probe, prove_same
from gossamer.parts.sentences import encode_texts
from gossamer.pipeline.stage import is_adapted

TYPES: dict[str, tuple[str, ...]] = {
    "gguf": tuple(export_gguf.TYPES),
    "onnx": (),
    "safetensors": tuple(export_plain.TYPES),
    "peft": (),
    "package": (),
}
_ONNX = Bound(top1=0.99, kl=1e-6, largest=1e-2)
_SAFETENSORS = {"f32": Bound(top1=0.99, kl=1e-6, largest=1e-2), "f16": Bound(kl=1e-3), "bf16": Bound(kl=1e-2)}
_VECTORS = {"f32": 1e-4, "f16": 1e-3, "bf16": 1e-2}
_ADAPTER = 0.05  # log-probability
_TOKEN_BYTES = 200  # of a vocabulary entry with its merges, in tokenizer.json
_NEW = 12
_FULL = ("no space left", "code: 28", "requested and", "quota")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and the figures of its proof."""

    path: str
    format: str
    type: str | None
    bytes: int
    proof: dict[str, Any]


def check_export(out: Path, to: str, kind: str | None = None) -> None:
    """Before a model is loaded: OptionError for an unknown format or type, InputError where ``out`` exists."""
    if to not in TYPES:
        raise OptionError("export --to", must="be a format", got=repr(to), do=did_you_mean(to, TYPES))
    if kind is not None and kind not in TYPES[to]:
        do = did_you_mean(kind, TYPES[to]) if TYPES[to] else "leave --type out, this format has one"
        raise OptionError(f"export --to {to} --type", must="be a type of this format", got=repr(kind), do=do)
    if out.exists():
        must, do = "be a new path", "choose another name, or remove what is there"
        raise InputError(f"export --out {out}", must=must, got="one that exists", do=do)
    if to == "gguf" and out.suffix != ".gguf":
        raise InputError(f"export --out {out}", must="be the name of a file ending in .gguf", do=f"write {out}.gguf")


def export(bundle: Bundle, out: Path, to: str, kind: str | None = None) -> Exported:
    """Write ``bundle`` to ``out`` as ``to``, a key of :data:`TYPES`, and prove it.

    The bundle is used up: its model is cast to float32 and its adapter folded in. Raises what :func:`check_export`
    raises; InputError for a model or tokenizer that the format cannot hold; GossamerError for a full disk and for a
    difference beyond the bounds. In each case nothing is left at ``out``.
    """
    check_export(out, to, kind)
    where, present = f"export --to {to}", getattr(bundle.model, Acceleration.slot, None)
    if present:
        got, do = f"one with {present}, which changes how it runs", "export the model without it"
        raise InputError(where, must="get a model that nothing accelerates", got=got, do=do)
    if not isinstance(_base(bundle.model), PreTrainedModel):
        raise InputError(where, must="get a model of transformers", got=type(bundle.model).__name__)
    with _no_bars():
        proof, kind = _WRITERS[to](bundle, out, kind)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return Exported(str(out), to, kind, sum(path.stat().st_size for path in files), proof)


def _package(bundle: Bundle, out: Path, kind: None) -> tuple[dict[str, Any], str | None]:
    from gossamer.core.manifest import summary
    from gossamer.pipeline.packages import write_package

    return summary(write_package(bundle, out)), kind


def _gguf(bundle: Bundle, out: Path, kind: str | None) -> tuple[dict[str, Any], str | None]:
    kind = kind or TYPES["gguf"][0]
    tokenizer = bundle.processor
    export_gguf.check_gguf_model(_base(bundle.model))
    ends = end_ids(_base(bundle.model), tokenizer)
    tokens = read_tokens(tokenizer, _base(bundle.model).config.vocab_size, ends)
    model = export_plain.as_float32(bundle.model)
    before = export_proof.record(model, tokenizer)
    plain = _plain(bundle)
    export_gguf.check_gguf_model(plain)
    with _placed(out, export_gguf.gguf_bytes(plain, kind), atomic_file) as path:
        export_gguf.write_gguf(plain, tokens, path, kind)
        return prove_gguf(path, plain, tokenizer, before, kind), kind


def _onnx(bundle: Bundle, out: Path, kind: None) -> tuple[dict[str, Any], str | None]:
    export_onnx.check_onnx_model(_base(bundle.model), bundle.processor)
    before = _before(bundle)
    plain = _plain(bundle)
    with _placed(out, _folder_bytes(plain, 4), atomic_dir) as path:
        export_onnx.write_onnx(plain, bundle.processor, path)
        if isinstance(before, Reference):
            decoder = export_onnx.OnnxDecoder(path)
            found = export_proof.compare(before.logits, decoder.logits(before.ids))
            proof: dict[str, Any] = prove(found, _ONNX, "export onnx")
            _prove_greedy(plain, bundle.processor, decoder, before)
        else:
            after = export_onnx.OnnxEncoder(path, plain.config)
            proof = _prove_vectors(before, after, bundle.processor, _VECTORS["f32"], "export onnx")
        read = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        _prove_processor(bundle.processor, read, "export onnx")
        return proof, None


def _safetensors(bundle: Bundle, out: Path, kind: str | None) -> tuple[dict[str, Any], str | None]:
    from gossamer.hub.models import load_model

    export_plain.refuse_own_shapes(_base(bundle.model), "export safetensors")
    kind = kind or _stored(_base(bundle.model))
    what, width = f"export safetensors {kind}", export_plain.TYPES[kind].itemsize
    before = _before(bundle)
    plain = _plain(bundle)
    with _placed(out, _folder_bytes(plain, width), atomic_dir) as path:
        export_plain.write_safetensors(plain, bundle.processor, path, kind)
        again, processor = load_model(path, dtype="float32")
        if isinstance(before, Reference):
            found = export_proof.compare(before.logits, export_proof.model_logits(again, before.ids))
            proof: dict[str, Any] = prove(found, _SAFETENSORS[kind], what)
            prove_equal(
                before.ends, end_ids(again, export_proof.text_tokenizer(bundle.processor)), f"{what}: end tokens"
            )
        else:
            proof = _prove_vectors(before, again, bundle.processor, _VECTORS[kind], what)
        _prove_processor(bundle.processor, processor, what)
        return proof, kind


def _peft(bundle: Bundle, out: Path, kind: None) -> tuple[dict[str, Any], str | None]:
    from peft import PeftModel

    model = bundle.model
    if not isinstance(model, PeftModel):
        got = "an adapter of hooks and own modules" if is_adapted(model) else "a model without one"
        do = "run without the merge step" if not is_adapted(model) else "fold it in with the other formats"
        raise InputError("export --to peft", must="get a model with a PEFT adapter attached", got=got, do=do)
    before = probe(export_plain.as_float32(model), bundle.processor, TEXTS)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with _placed(out, 4 * trained, atomic_dir) as path:
        export_plain.write_peft(model, path)
        export_plain.restore_linears(model)  # PEFT alone knows no packed layers
        base = bundle.adapters[-1].detach(model) if bundle.adapters else model.unload()
        again: Any = PeftModel.from_pretrained(base, str(path))
        after = probe(again, bundle.processor, TEXTS, like=before)
        return prove_same(before, after, what="export peft", largest=_ADAPTER, weights=False).as_dict(), None


Writer = Callable[[Bundle, Path, Any], tuple[dict[str, Any], str | None]]
_WRITERS: dict[str, Writer] = {
    "gguf": _gguf,
    "onnx": _onnx,
    "safetensors": _safetensors,
    "peft": _peft,
    "package": _package,
}


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _stored(model: Any) -> str:
    """The type that the weights have; bf16 for packed ones."""
    if getattr(model.config, "quantization_config", None) is not None:
        return "bf16"
    return next((name for name, dtype in export_plain.TYPES.items() if dtype == model.dtype), "f32")


def _before(bundle: Bundle) -> Reference | torch.Tensor:
    """What the model gives: logits of a decoder, sentence vectors [n, d] of an encoder."""
    model = export_plain.as_float32(bundle.model)
    if _base(bundle.model).can_generate():
        return export_proof.record(model, bundle.processor)
    return encode_texts(model, export_proof.text_tokenizer(bundle.processor), TEXTS)


def _plain(bundle: Bundle) -> Any:
    """The model in float32 with its adapter folded in and nothing packed."""
    model = bundle.model
    if is_adapted(model):
        adapter = bundle.adapters[-1] if bundle.adapters else None
        if adapter is not None and (not hasattr(adapter, "merge") or hasattr(adapter, "processor")):
            do = "detach it, or hand on the folder of the run"
            raise InputError("export", must="get an adapter that folds into the weights", got=adapter.name, do=do)
        export_plain.restore_linears(model)
        model = adapter.merge(model) if adapter else model.merge_and_unload(safe_merge=True)
        bundle.model = model
    return export_plain.plain_model(model)


def _folder_bytes(model: Any, width: int) -> int:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    return width * sum(parameter.numel() for parameter in model.parameters()) + _TOKEN_BYTES * vocabulary


def _prove_greedy(model: Any, tokenizer: Any, decoder: export_onnx.OnnxDecoder, before: Reference) -> None:
    """Two prompts of different lengths as one batch are continued alike."""
    prompts = [before.ids[0][:9], before.ids[0][:20]]
    config = greedy_config(model, tokenizer, max_new_tokens=_NEW, min_new_tokens=_NEW)
    config.eos_token_id = None
    pad: int = config.pad_token_id
    wanted = model.generate(**left_pad(prompts, pad), generation_config=config)[:, -_NEW:]
    found = decoder.generate(prompts, pad, _NEW)
    prove_equal(wanted.tolist(), found.tolist(), "export onnx: greedy continuation")


def _prove_vectors(before: torch.Tensor, after: Any, processor: Any, bound: float, what: str) -> dict[str, Any]:
    found = float((before - encode_texts(after, export_proof.text_tokenizer(processor), TEXTS)).abs().max())
    if not found <= bound:
        must = f"change no entry of a sentence vector by more than {bound:g}"
        raise GossamerError(f"round trip, {what}", must=must, got=f"{found:.3g}", do="nothing was written")
    return {"largest": found}


def _prove_processor(before: Any, after: Any, what: str) -> None:
    """The tokenizer read back cuts texts and renders a chat as before."""
    old, new = export_proof.text_tokenizer(before), export_proof.text_tokenizer(after)
    prove_equal(getattr(before, "chat_template", None), getattr(after, "chat_template", None), f"{what}: chat template")
    prove_equal(export_proof.render(old), export_proof.render(new), f"{what}: chat as rendered")
    cut = [[tokenizer(text)["input_ids"] for text in TEXTS] for tokenizer in (old, new)]
    prove_equal(cut[0], cut[1], f"{what}: tokenizer")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars of each file that is read back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _placed(out: Path, need: int, place: Callable[[Path], Any]) -> Iterator[Path]:
    """A temporary path that becomes ``out`` at the end; ``need`` is about how many bytes will be written."""
    made = [folder for folder in out.parents if not folder.exists()]
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    if free < need:
        raise _no_room(out, need, free)
    try:
        with place(out) as path:
            try:
                yield path
            except Exception as error:
                # safetensors and numpy wrap what the system says
                full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                if full or any(words in str(error).lower() for words in _FULL):
                    raise _no_room(out, need, free) from error
                raise
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not made yet, or used by somebody else by now
                folder.rmdir()
        raise


def _no_room(out: Path, need: int, free: int) -> GossamerError:
    must = f"find room for about {need / 1e6:,.0f} MB"
    do = "free space or choose another folder; nothing was left there"
    return GossamerError(f"writing {out}", must=must, got=f"a full disk ({free / 1e6:,.0f} MB free at first)", do=do)
