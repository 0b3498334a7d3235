"""Writes the table: `python -m tests.train.bad_inputs > docs/trainer-bad-inputs.md`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from . import ROWS, NotTriedError, happened

HEAD = """# Bad inputs to the trainer

Each row is tested by `tests/train/test_bad_inputs.py`; the last column is what happened. This file is written
by `python -m tests.train.bad_inputs > docs/trainer-bad-inputs.md`. Files that are damaged bit by bit, links
and locks are tested by `tests/train/run/test_bit_flips.py` and `tests/files/test_storage.py`.

| input | what must happen | what happened |
|---|---|---|"""


def write_table() -> int:
    print(HEAD)
    failed = 0
    os.environ["FASTKD_CACHE"] = tempfile.mkdtemp()
    for what, must, act in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen = happened(act, Path(folder)).replace(f"{folder}/", "")
            except NotTriedError as reason:
                seen = f"not tried: {reason}"
            except Exception as error:
                seen, failed = f"**failed**: {type(error).__name__} {error}"[:300], failed + 1
        cells = (
            " ".join(cell.split()).replace("|", r"\|").replace("<", "&lt;") for cell in (what, must, seen)
        )
        print("|", " | ".join(cells), "|", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(write_table())
