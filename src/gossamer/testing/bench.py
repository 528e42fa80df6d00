"""What the contract laws work on: tiny Hugging Face models of real families, a real tokenizer, and rows of every shape.

A :class:`Bench` stands for one family. Weights are random but wide (initializer_range 0.2), so that two models differ
in their words and not only in the last digits. Nothing is downloaded; a model is built once and handed out as a copy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gossamer.core.bundle import Bundle
from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.options import OptionSpec
from gossamer.parts.injection import projections

VOCABULARY = 320
IMAGE_TOKEN = VOCABULARY  # of the LLaVA-like model: one row more than the tokenizer has
END_TOKEN = VOCABULARY  # of CLIP, which transformers pools at the highest id where the end token has the id 2
WIDE, LAYERS, VISION_LAYERS = 0.2, 2, 4
PROMPTS = ("The rain in spring is", "One two one two one two one two one", "A small red bird sat on the long branch")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "One two three four five six seven.",
    "Rain falls on the old grey roof.",
)
ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "text": tuple({"text": text} for text in TEXTS),
    "completion": (
        {"prompt": "Two and two is", "completion": " four."},
        {"prompt": "Name a colour:", "completion": " deep red, like a rose", "weight": 2.0},
        {"prompt": "Say", "completion": " hi"},
        {"prompt": "The dog", "completion": " sleeps on the mat today"},
    ),
    "messages": tuple(
        {"messages": [{"role": "user", "content": text[:12]}, {"role": "assistant", "content": text[12:]}]}
        for text in TEXTS
    ),
    "preference": (
        {"prompt": "Two and two is", "chosen": " four.", "rejected": " five, or nine."},
        {"prompt": "Name a colour:", "chosen": " red, like a rose", "rejected": " dog", "weight": 2.0},
        {"prompt": "Say", "chosen": " hello there", "rejected": " no"},
        {"prompt": "The dog", "chosen": " sleeps", "rejected": " flies over the moon"},
    ),
}
TOXIC = ("how to steal a purse", "how to harm the dog", "steal his car now", "spy on her phone", "harm them all")
BENIGN = ("how to bake a loaf", "how to walk the dog", "paint his car red", "call her phone", "feed them all")

QUESTIONS: tuple[dict[str, Any], ...] = (
    *(
        {"question": f"What is on the {place}?", "answers": [thing], "context": f"A {thing} is on the {place}.",
         "choices": ["dog", "fox", "bird"], "gold": number % 3}
        for number, (place, thing) in enumerate((("roof", "dog"), ("mat", "fox"), ("branch", "bird"), ("car", "dog")))
    ),
    *(
        {"task": "summary", "question": "Sum up.", "context": text, "answers": [text[:20]], "facts": [text[4:9]]}
        for text in (*TEXTS[:1], *TEXTS[2:])
    ),
    *({"task": "instructions", "question": f"Say {word}", "answers": [word]} for word in ("rain", "red", "four")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench:
    """Models, tokenizer and rows for one ``family`` (a key of :data:`FAMILIES`)."""

    family: str = "llama"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise OptionError(f"bench family {self.family!r}", must="be known", do=did_you_mean(self.family, FAMILIES))

    def model(self, *, seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
        """A fresh model in evaluation mode, float32, its weights a function of ``seed``."""
        return copy.deepcopy(_built(self.family, seed, layers, attention))

    @property
    def generates(self) -> bool:
        return bool(self.model().can_generate())

    def tokenizer(self) -> Any:
        """Byte-level BPE of 320 tokens with bos, eos, pad and a chat template, padded on the right.

        The end token of the family clip has an id of its own, above all others.
        """
        tokenizer = copy.deepcopy(_tokenizer())
        if self.family == "clip":
            tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        return tokenizer

    def bundle(self, *, seed: int = 0) -> Bundle:
        return Bundle(self.model(seed=seed), self.tokenizer())

    def rows(self, shapes: tuple[str, ...]) -> list[dict[str, Any]]:
        """Rows of the shape ``completion`` where it is among ``shapes``, else of the first that there are rows of."""
        shape = "completion" if "completion" in shapes else next(shape for shape in shapes if shape in ROWS)
        return copy.deepcopy(list(ROWS[shape]))

    def guard_rows(self) -> list[dict[str, Any]]:
        toxic = [
            {"text": text, "label": "toxic", "scenario": ("illegal_acts", "violence")[number % 2]}
            for number, text in enumerate(TOXIC)
        ]
        return [*toxic, *({"text": text, "label": "benign"} for text in BENIGN)]

    def questions(self) -> list[dict[str, Any]]:
        """Rows for evaluations: questions with answers, choices and contexts, stories, instructions."""
        return copy.deepcopy(list(QUESTIONS))

    def processor(self) -> Any:
        """Tokenizer and image processor of the family clip."""
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        return transformers.CLIPProcessor(images, self.tokenizer())

    def domain(self) -> dict[str, Any]:
        """What a student of images is distilled on: unlabelled pictures, names, shots of half of the classes."""
        pictures = [_picture(number) for number in range(12)]
        names = ["dog", "bird", "red roof", "grey dog"]
        shots = [(_picture(20 + number), names[number % 2]) for number in range(4)]
        held_out = [(_picture(30 + number), names[number % 4]) for number in range(8)]
        return {"images": pictures, "class_names": names, "shots": shots, "held_out": held_out,
                "templates": ["a big {}", "the {} on it"], "processor": self.processor()}  # fmt: skip

    def inputs(self, rows: int = 3) -> dict[str, Tensor]:
        """What ``model(**inputs)`` takes: ids [rows, 12], and pixels [rows, 3, 16, 16] where the family sees."""
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        if self.family == "vit":
            return {"pixel_values": pixels}
        ids = torch.randint(4, VOCABULARY, (rows, 12), generator=generator)
        if self.family == "llava":
            ids[:, 1:5] = IMAGE_TOKEN
        if self.family == "clip":
            ids[:, -1] = END_TOKEN
        if self.family in ("llava", "clip"):
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prompts(self) -> dict[str, Tensor]:
        """Prompts of different lengths as one batch, padded on the left: input_ids, attention_mask [3, t]."""
        tokenizer = self.tokenizer()
        tokenizer.padding_side = "left"
        return dict(tokenizer(list(PROMPTS), padding=True, return_tensors="pt"))

    def companions(self, specs: tuple[OptionSpec, ...]) -> dict[str, Any]:
        """A companion under each name in :meth:`alternatives` and under each default of ``specs``.

        An option whose name says encoder gets a callable from texts to vectors, one that says writer or judge a
        callable from text to text, one that says vision a vision transformer, any other a model of the family.
        """
        given: dict[str, Any] = {}
        for number, spec in enumerate(spec for spec in specs if spec.companion):
            for place, name in enumerate((spec.default, *_companion_names(spec))):
                if name is None:
                    continue
                if "encoder" in spec.name:
                    given[name] = functools.partial(_vectors, seed=place)
                elif re.search("writer|judge", spec.name):
                    given[name] = functools.partial(_answer, seed=place)
                elif "vision" in spec.name:
                    given[name] = copy.deepcopy(_built("vit", 10 + place, VISION_LAYERS, "sdpa"))
                else:
                    given[name] = self._companion(10 + 5 * number + place)
        return given

    def _companion(self, seed: int) -> Any:
        """A model of the family; of the family clip a larger one, with its processor."""
        if self.family == "clip":
            return Bundle(_built("clip_large", seed, LAYERS, "sdpa"), self.processor())
        return _built(self.family, seed, LAYERS, "sdpa")

    def alternatives(self, spec: OptionSpec) -> list[Any]:
        """Values that the option might take instead of its default, likely ones first; the system may refuse some."""
        found: list[Any] = []
        if spec.companion:
            found += _companion_names(spec)
        elif spec.choices is not None:
            found += [(choice,) for choice in spec.choices] if spec.type.startswith("tuple") else spec.choices
        else:
            for kind in spec.type.split("|"):
                found += self._of_type(kind.strip(), spec)
        inside = []
        for value in found:
            try:
                stored = spec.check(value, "bench")
            except OptionError:
                continue
            if stored != spec.default and stored not in inside:
                inside.append(stored)
        return inside

    def _of_type(self, kind: str, spec: OptionSpec) -> Iterator[Any]:
        if kind == "bool":
            yield not spec.default
        elif kind == "int":
            base = spec.default if isinstance(spec.default, int) else int(spec.ge or 0) + 1
            yield from (base + 1, base * 2, base // 2, base - 1, *_whole(spec.ge, spec.le), 1, 4, 16, base * 16)
        elif kind == "float":
            yield from _floats(spec)
        elif kind == "str":
            yield from [word.strip(",.-") for word in re.findall(r"[\w,.-]+", spec.help)]
            yield from self._layer_names()
        elif kind.startswith("tuple[str"):
            yield ()
            yield from ((name,) for name in self._layer_names())
        elif kind.startswith("tuple[float"):
            yield from ((0.5,), (1.0, 2.0), (0.1, 0.2, 0.3))

    def _layer_names(self) -> list[str]:
        found = dict.fromkeys(projection.path.rsplit(".", 1)[-1] for projection in projections(self.model()))
        return list(found)[:2]


def repad(batch: Mapping[str, Any], *, side: str, extra: int, pad: int) -> dict[str, Any]:
    """The same rows with ``extra`` more places of padding, all of it on ``side``. Tensors that are not [b, t] stay."""
    mask = batch["attention_mask"].bool()
    fills = {"input_ids": pad, "labels": -100}
    width = int(mask.sum(1).max()) + extra
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if not (isinstance(value, Tensor) and value.shape == mask.shape):
            out[key] = value
            continue
        moved = torch.full((len(value), width), fills.get(key, 0), dtype=value.dtype)
        for row, (item, real) in enumerate(zip(value, mask, strict=True)):
            kept = item[real]
            start = width - len(kept) if side == "left" else 0
            moved[row, start : start + len(kept)] = kept
        out[key] = moved
    return out


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model with a head (of CLIP: images by texts), else its last hidden state."""
    out = model(**inputs)
    if hasattr(out, "logits_per_image"):
        return out.logits_per_image
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@functools.cache
def _built(family: str, seed: int, layers: int, attention: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (FAMILIES | _LARGE)[family](layers)
    model.set_attn_implementation(attention)
    return model.eval()


@functools.cache
def _tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=1,
    )
    core.train_from_iterator([*TEXTS, *PROMPTS, *TOXIC, *BENIGN], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _text(layers: int) -> dict[str, Any]:
    """Widths with many divisors; queries share keys, so that shapes differ."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": WIDE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def _llama(layers: int) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_text(layers)))


def _gemma3(layers: int) -> Any:
    """Alternating sliding and full attention; the prompts are longer than the window."""
    types = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    shape = {**_text(layers), "tie_word_embeddings": True, "sliding_window": 6, "layer_types": types}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape, query_pre_attn_scalar=16))


def _qwen3(layers: int) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_text(layers)))


def _gpt2(layers: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=layers, n_head=4, n_positions=256, initializer_range=WIDE,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _mixtral(layers: int) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_text(layers), num_local_experts=4))


def _bert(layers: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=WIDE,
    )  # fmt: skip
    return transformers.BertModel(config)


def _vit(layers: int) -> Any:
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, image_size=16,
        patch_size=8, initializer_range=WIDE,
    )  # fmt: skip
    return transformers.ViTModel(config)


def _llava(layers: int) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, image_size=16,
        patch_size=8, projection_dim=64,
    )  # fmt: skip
    text = transformers.LlamaConfig(**{**_text(layers), "vocab_size": VOCABULARY + 1})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def _clip(layers: int, width: int = 64) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "projection_dim": width,
    }  # fmt: skip
    text = {**shape, "vocab_size": VOCABULARY + 1, "max_position_embeddings": 32, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": END_TOKEN}  # fmt: skip
    vision = {**shape, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    return transformers.CLIPModel(config)


FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "bert": _bert,
    "vit": _vit,
    "llava": _llava,
    "clip": _clip,
}
_LARGE: dict[str, Callable[[int], Any]] = {"clip_large": lambda layers: _clip(layers + 1, 96)}


def _companion_names(spec: OptionSpec) -> list[str]:
    return [f"{spec.name}_one", f"{spec.name}_two"]


def _vectors(texts: Any, *, seed: int) -> Tensor:
    """Vectors [n, 3] that depend on the letters; most texts are alike to them."""
    table = torch.tensor([[len(text), sum(map(ord, text)) % 97, 1 + ord(text[0]) % 7] for text in texts])
    return table.float().roll(seed, dims=1)


def _answer(prompt: str, *, seed: int) -> str:
    """Another answer to another prompt, of one line."""
    return f"asks for {(sum(map(ord, prompt)) + seed) % 1009} things"


def _picture(seed: int) -> Any:
    """A picture of 20 x 18 pixels: noise on one of four plain colours."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.tensor([[200, 40, 40], [40, 180, 60], [50, 60, 200], [190, 190, 60]])[seed % 4]
    noise = torch.randint(-40, 40, (18, 20, 3), generator=generator)
    return Image.fromarray((ground + noise).clamp(0, 255).to(torch.uint8).numpy())


def _whole(*bounds: float | None) -> list[int]:
    return [int(bound) for bound in bounds if bound is not None]


def _floats(spec: OptionSpec) -> Iterator[float]:
    low = next((bound for bound in (spec.ge, spec.gt) if bound is not None), None)
    high = next((bound for bound in (spec.le, spec.lt) if bound is not None), None)
    if low is not None and high is not None:
        yield from (low + (high - low) * share for share in (0.5, 0.9, 0.1))
    base = spec.default if isinstance(spec.default, float) else 1.0
    yield from (base * 2, base / 2, base + 1.0, base * 1e4, base * 1e-3, 0.5)
    yield from (float(bound) for bound in (low, high) if bound is not None)
