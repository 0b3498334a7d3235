"""Reports that several scripts write: each owns one section of a Markdown file."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

from fastkd.bench.results import device_name
from fastkd.files.atomic import write_atomically
from fastkd.version import __version__


def write_section(path: Path, title: str, heading: str, body: str) -> None:
    """Replace the section ``## heading`` of the file, or append it; ``title`` is that of a new file."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    section = f"## {heading}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        rest = text[found.end() :]
        text = text[: found.start()] + section + ("\n" + rest if rest else "")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def measured_on() -> str:
    """CPU, versions and date, for the line above a table."""
    return (
        f"{device_name('cpu')}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}, fastkd {__version__}, {date.today()}"
    )
