"""``python -m gossamer.hub.nursery.train NAME``: train a nursery model, or go on where a killed run stopped."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

TRAINERS = {
    "clip-small": "clip:train_clip",
    "llama-7m": "training:train_nursery",
    "narrator": "narrator:train_narrator",
    "vlm-small": "vision_training:train_vision",
    "vlm-gemma": "vision_training:train_vision",
}


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.hub.nursery.train", description=__doc__)
    parser.add_argument("name", choices=sorted(TRAINERS))
    parser.add_argument("--tokens", type=int, help="training tokens in all, of a language model (default: its own)")
    parser.add_argument("--steps", type=int, help="optimizer steps in all, of the others (default: their own)")
    parser.add_argument("--out", type=Path, help="folder to write the model to (default: the package or the cache)")
    options = parser.parse_args()
    module, function = TRAINERS[options.name].split(":")
    length: dict[str, Any] = {"tokens": options.tokens} if options.name == "llama-7m" else {"steps": options.steps}
    train = getattr(importlib.import_module(f"gossamer.hub.nursery.{module}"), function)
    report = train(options.name, **length, out=options.out)
    scores = {key: value for key, value in report.items() if key.startswith("held_out")}
    print(f"after {report['seconds']:.0f} s: {scores}")


if __name__ == "__main__":
    main()
