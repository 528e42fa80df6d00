"""Loading and streaming for the verbs that talk to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_any(where: str) -> tuple[Any, Any]:
    """A model by name, folder or hub id, or the result in the folder of a run."""
    import gossamer
    from gossamer.pipeline.stage import load_bundle

    for folder in (Path(where) / "result", Path(where)):
        if (folder / "bundle.json").exists():
            bundle = load_bundle(folder)
            return bundle.model.eval(), bundle.processor
    return gossamer.load(where)


def stream(model: Any, tokenizer: Any, text: str, new_tokens: int, temperature: float, seed: int) -> str:
    """Print the continuation as it comes and return it."""
    import torch
    from transformers import TextStreamer

    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
