"""Keep what a demo run measured for the README, and a picture of its report.

    python docs/record_demo.py runs/quickstart-1

Writes src/gossamer/evidence/bench/quickstart.json and, where Chromium is installed, docs/images/report.png.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "src" / "gossamer" / "evidence" / "bench" / "quickstart.json"
PICTURE = ROOT / "docs" / "images" / "report.png"
SIZE = "1200,1500"


def main(run: Path) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "report.json", KEPT)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit(f"wrote {KEPT}; no Chromium here, so the picture is the old one")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}", f"--window-size={SIZE}"]
        page = (run / "report.html").resolve().as_uri()
        subprocess.run([browser, *flags, f"--screenshot={PICTURE}", page], check=True, capture_output=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
