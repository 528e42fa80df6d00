"""``python -m gossamer.hub.nursery.train llama-7m``: train a nursery model, or go on where a killed run stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from gossamer.hub.nursery.training import SPECS, train_nursery


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.hub.nursery.train", description=__doc__)
    parser.add_argument("name", choices=sorted(SPECS))
    parser.add_argument("--tokens", type=int, help="training tokens in all (default: as the model's specification)")
    parser.add_argument("--out", type=Path, help="folder to write the model to (default: the package itself)")
    options = parser.parse_args()
    report = train_nursery(options.name, tokens=options.tokens, out=options.out)
    print(f"held-out bits per byte {report['held_out_bits_per_byte']:.3f} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
