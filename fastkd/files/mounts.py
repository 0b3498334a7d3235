"""What the file system below a path promises."""

from __future__ import annotations

import os
import re
from pathlib import Path


def keeps_times(folder: Path) -> bool:
    """Whether a folder's times change with the files in it: not promised by FUSE, as of object stores."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # macOS, Windows
        return True
    kind = kind_of_mount(os.path.realpath(folder), mounts)
    return kind != "fuse" and not kind.startswith("fuse.")


def kind_of_mount(path: str, mounts: str) -> str:
    """The file system's type at an absolute path; ``mounts`` as in ``/proc/self/mountinfo``."""
    kind, longest = "", -1
    for line in mounts.splitlines():
        of_mount, _, of_system = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), of_mount.split(" ")[4])
        # Of several mounts on one point the last is seen.
        if len(point) >= longest and f"{path}/".startswith(point.rstrip("/") + "/"):
            kind, longest = of_system.split(" ")[0], len(point)
    return kind
