"""The one door to models: a folder, a ``.gguf`` file, a packaged model, or a Hugging Face hub id, by name.

``resolve`` finds the files and says where they came from; ``load_model`` loads them through transformers' Auto classes.
A packaged model is one file of this folder; its name is the file's stem with dashes. It is converted once into the
cache, under a lock, and its manifest.json lists every file with its SHA-256 and the hashes of what it was made from.
The small models that Gossamer trained itself (folders of ``gossamer.hub.nursery``) go by their folder's name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from gossamer.core.errors import InputError, did_you_mean
from gossamer.core.manifest import is_package
from gossamer.core.paths import atomic_dir, cache_dir, sha256, write_json
from gossamer.hub.models._gguf import check_gguf
from gossamer.hub.models._packaged import PackagedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["auto", "bfloat16", "float32"]
Task = Literal["causal-lm", "encoder", "image-encoder", "image-text"]

_MANIFEST = "manifest.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Where a model lies: ``path`` is a Hugging Face folder, or the folder of ``gguf`` where that is set.

    ``source`` is "folder" (a local folder or file), "cache" (Hugging Face cache), "hub" (downloaded now) or "package".
    ``gguf_bytes`` is the size of the GGUF that the weights come from, where they come from one.
    """

    path: Path
    name: str
    source: Literal["folder", "cache", "hub", "package"]
    notes: tuple[str, ...] = ()
    licence: str = ""
    gguf: Path | None = None
    gguf_bytes: int | None = None


def packaged_names() -> list[str]:
    """Names of the packaged models: the files of this folder."""
    stems = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return sorted(stem.replace("_", "-") for stem in stems)


def packaged(name: str) -> tuple[PackagedModel, Callable[[Path], dict[str, Any]]]:
    """Description and ``convert`` of a packaged model."""
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.MODEL, module.convert


def resolve(name_or_path: str | Path, *, offline: bool | None = None) -> Resolved:
    """Find a model; order: local folder or ``.gguf`` file, packaged name, Hugging Face cache, hub.

    ``offline`` True asks the network for nothing; None follows HF_HUB_OFFLINE. Raises InputError that names each place
    tried, or says what is wrong with the one that was found; MissingExtra where a model's package is not installed.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_file(path)
    if name in packaged_names():
        return _converted(name)
    nursery = _nursery()
    if name in nursery:
        return Resolved(nursery[name], name, "package", ("trained from scratch by Gossamer",), "Apache-2.0")
    return _from_hub(name, offline)


def load_model(
    name_or_path: str | Path, *, dtype: Dtype = "auto", task: Task | None = None, offline: bool | None = None
) -> tuple[PreTrainedModel, Any]:
    """Model in eval mode with its processor (tokenizer, image processor or both), through the Auto classes.

    ``dtype`` "auto" is the checkpoint's own (float32 for a GGUF, whose blocks it unpacks exactly). ``task`` None takes
    the head that the checkpoint was saved with. The folder of a package gives its model with the adapter on it, after
    every file was checked. Raises InputError where a weight of the wanted model is not in the
    checkpoint, where the checkpoint's quantiser is not registered, or where there is no processor.
    """
    import torch
    import transformers
    import transformers.models.auto.modeling_auto  # own architectures register when this comes
    from safetensors import SafetensorError

    if is_package(Path(name_or_path).expanduser()):
        from gossamer.hub.packages import open_model

        return open_model(Path(name_or_path).expanduser(), dtype=dtype, task=task, offline=offline)
    found = resolve(name_or_path, offline=offline)
    source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if found.gguf is not None:
        source["gguf_file"] = found.gguf.name
    config = transformers.AutoConfig.from_pretrained(found.path, **source)
    _check_quantiser(found, config)
    auto, processor_class = _classes(found.path, config, task)
    options = dict(source)
    if found.gguf is not None:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        options["dtype"] = torch.float32
    if dtype != "auto":
        options["dtype"] = getattr(torch, dtype)
    try:
        model, loaded = auto.from_pretrained(found.path, output_loading_info=True, **options)
    except SafetensorError as error:
        must, do = "have whole safetensors files", "copy or save the model again"
        raise InputError(f"model {found.path}", must=must, got=str(error), do=do) from error
    # an encoder's pooler is a head of its own, which many checkpoints lack and nothing here reads
    missing = sorted(str(key) for key in loaded["missing_keys"] if "pooler" not in str(key))
    wrong = missing or sorted(str(key) for key in loaded["mismatched_keys"])
    if wrong:
        got = f"{len(wrong)} missing or of another shape, {wrong[0]} first"
        do = f"load it as what it was saved as ({config.architectures}), or save it again"
        raise InputError(f"model {found.path}", must=f"hold every weight of {type(model).__name__}", got=got, do=do)
    try:
        processor = processor_class.from_pretrained(found.path, **source)
    except (OSError, ValueError, KeyError) as error:
        must, do = f"load with {processor_class.__name__}", "save the tokenizer or image processor into the folder"
        raise InputError(f"model {found.path}", must=must, got=str(error).split("\n")[0], do=do) from error
    shown = str(found.path) if found.source == "folder" else found.name
    model.config._name_or_path = model.name_or_path = shown
    if hasattr(processor, "name_or_path"):
        processor.name_or_path = shown
    return model.eval(), processor


def _folder(path: Path) -> Resolved:
    wrong = _unusable(path)
    if wrong:
        raise InputError(f"model folder {path}", must="be a Hugging Face model folder", got=wrong[0], do=wrong[1])
    manifest = _manifest(path)
    name = manifest.get("name") or path.resolve().name
    facts = manifest.get("facts") or {}
    notes = tuple(manifest.get("notes") or ())
    return Resolved(path, name, "folder", notes, manifest.get("licence") or "", gguf_bytes=facts.get("gguf_bytes"))


def _unusable(path: Path) -> tuple[str, str] | None:
    """What a folder lacks to be a model, and what to do; None where it lacks nothing."""
    names = {entry.name for entry in path.iterdir()}
    if is_package(path):
        return "a package (manifest.json)", "open it with gossamer.load or gossamer.saved"
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return "an adapter (adapter_config.json)", "load its base model and attach the adapter to it"
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        if ggufs:
            return f"no config.json but {ggufs[0]}", f"give the file itself: {path / ggufs[0]}"
        return "no config.json", "give the folder that save_pretrained wrote"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(shards - names)
        return (f"no {absent[0]}, which {index.name} lists", "copy every shard") if absent else None
    if any(name.endswith(".safetensors") for name in names):
        return None
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "pickled weights only", "convert them to safetensors where you trust them (save_pretrained does)"
    return "no .safetensors file", "copy the weights beside config.json"


def _gguf_file(path: Path) -> Resolved:
    architecture = check_gguf(path)
    notes = (f"a GGUF file ({architecture}), unpacked at load",)
    return Resolved(path.parent, path.stem, "folder", notes, gguf=path, gguf_bytes=path.stat().st_size)


def _nursery() -> dict[str, Path]:
    folder = Path(__file__).parent.parent / "nursery"
    return {config.parent.name: config.parent for config in folder.glob("*/config.json")}


def _converted(name: str) -> Resolved:
    """A packaged model in the cache, converted now where that has not been done."""
    model, convert = packaged(name)
    folder = cache_dir("models") / name
    if not _current(folder, model):
        with FileLock(str(folder) + ".lock"):
            if not _current(folder, model):
                with atomic_dir(folder) as temporary:
                    facts = convert(temporary)
                    write_json(temporary / _MANIFEST, _describe(model, temporary, facts))
    gguf_bytes = _manifest(folder)["facts"].get("gguf_bytes")
    return Resolved(folder, name, "package", model.notes, model.licence, gguf_bytes=gguf_bytes)


def _describe(model: PackagedModel, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "name": model.name,
        "licence": model.licence,
        "notes": list(model.notes),
        "revision": model.revision,
        "facts": facts,
        "sources": [dataclasses.asdict(file) for file in model.files],
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        },
    }


def _current(folder: Path, model: PackagedModel) -> bool:
    """The cached folder is of this revision and source, and every file has its recorded size."""
    manifest = _manifest(folder)
    if manifest.get("revision") != model.revision:
        return False
    if manifest.get("sources") != [dataclasses.asdict(file) for file in model.files]:
        return False
    sizes = {folder / name: file["bytes"] for name, file in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _from_hub(name: str, offline: bool | None) -> Resolved:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    packaged_ones = packaged_names() + sorted(_nursery())
    tried = [f"local folder: no {name}", f"packaged models: not among {', '.join(packaged_ones)}"]
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        wrong = _unusable(folder)
        if wrong is None:
            return Resolved(folder, name, "cache")
        tried.append(f"Hugging Face cache: {wrong[0]} in {folder}")
    except LocalEntryNotFoundError:
        tried.append(f"Hugging Face cache: not in {constants.HF_HUB_CACHE}")
    except HFValidationError:
        raise _not_found(name, [*tried, "Hugging Face: not an id of the form owner/name"], packaged_ones) from None
    if constants.is_offline_mode() if offline is None else offline:
        tried.append("Hugging Face hub: offline (HF_HUB_OFFLINE or offline=True), not asked")
        raise _not_found(name, tried, packaged_ones)
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    # the client raises OSError, ValueError or its own kinds for an unknown id, a gate, or no network
    except Exception as error:
        tried.append(f"Hugging Face hub: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        raise _not_found(name, tried, packaged_ones) from error
    wrong = _unusable(folder)
    if wrong:
        raise InputError(f"model {name!r} from the hub", must="be a transformers model", got=wrong[0], do=wrong[1])
    return Resolved(folder, name, "hub")


def _not_found(name: str, tried: list[str], choices: list[str]) -> InputError:
    do = f"{did_you_mean(name, choices)} Or give a folder, or download the model where there is a network"
    return InputError(f"model {name!r}", must="be found", got="nothing in [" + "; ".join(tried) + "]", do=do)


def _check_quantiser(found: Resolved, config: Any) -> None:
    """transformers only warns of an unknown quantiser and then loads a wrong model."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        do = "install the distribution that brings this quantiser and import gossamer before loading"
        must = "name a registered quantiser in quantization_config.quant_method"
        raise InputError(f"model {found.path}", must=must, got=repr(method), do=do)


def _own_class(hf: Any, config: Any) -> Any:
    """The Auto class that an architecture of this package registered itself with."""
    autos = (hf.AutoModelForImageTextToText, hf.AutoModelForCausalLM, hf.AutoModel)
    return next(auto for auto in autos if type(config) in auto._model_mapping)


def _classes(path: Path, config: Any, task: Task | None) -> tuple[Any, Any]:
    """Auto class of the model and of its processor."""
    import transformers as hf

    architecture = (config.architectures or [""])[0]
    if task is None and type(config).__module__.startswith("gossamer."):
        return _own_class(hf, config), hf.AutoProcessor
    has_text, has_images = (path / "tokenizer_config.json").is_file(), (path / "preprocessor_config.json").is_file()
    if task is None and (architecture.endswith("LMHeadModel") or not architecture):
        task = "causal-lm"
    elif task is None and architecture.endswith("ForConditionalGeneration") and hasattr(config, "vision_config"):
        task = "image-text"
    elif task is None and "For" not in architecture:
        task = "image-encoder" if has_images and not has_text else "encoder"
    if task is None:
        head = architecture.rpartition("For")[2]
        head = "Seq2SeqLM" if head == "ConditionalGeneration" else head
        auto = getattr(hf, f"AutoModelFor{head}", None)
        if auto is None:
            do = "name the task: causal-lm, encoder, image-encoder or image-text"
            raise InputError(f"model {path}", must="have an architecture with an Auto class", got=architecture, do=do)
        return auto, hf.AutoTokenizer if has_text or not has_images else hf.AutoImageProcessor
    return {
        "causal-lm": (hf.AutoModelForCausalLM, hf.AutoTokenizer),
        "encoder": (hf.AutoModel, hf.AutoTokenizer),
        "image-encoder": (hf.AutoModel, hf.AutoImageProcessor),
        "image-text": (hf.AutoModelForImageTextToText, hf.AutoProcessor),
    }[task]
