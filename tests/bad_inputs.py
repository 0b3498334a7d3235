"""Bad and unusual inputs: the required and the observed behaviour on every backend that runs here.

``tests/test_bad_inputs.py`` runs every line of ``tests/bad_input_lines``;
``python tests/bad_inputs.py > docs/bad-inputs.md`` writes the page. Each line runs in its own forked process,
because it may set defaults of torch, or crash.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastkd

FUSED = ("native", "triton") if sys.platform == "linux" else ("native",)  # elsewhere there is no Triton
BACKENDS = (*FUSED, "eager")


@dataclass(frozen=True)
class Refused:
    """Requires an error of this type whose message matches."""

    kind: type[BaseException]
    pattern: str

    def __str__(self) -> str:
        """A readable pattern: "TypeError: student_logits … to_local or full_tensor"."""
        words = re.sub(r"\(\?i\)|[\^()\\]", "", self.pattern.replace(".*", " … ").replace("|", " or "))
        return f"{self.kind.__name__}: {words.strip(' …')}"


@dataclass(frozen=True)
class Gives:
    """Requires the results of ``expected`` on the eager backend, within rounding, or any that ``holds``
    accepts."""

    words: str
    expected: Callable[[], Any] | None = None
    holds: Callable[[Any], bool] | None = None

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Line:
    group: str
    input: str
    call: Callable[[], Any]
    must: Refused | Gives
    backends: Sequence[str] = BACKENDS

    @property
    def name(self) -> str:
        return f"{self.group}: {self.input}"


def tensors(results: Any) -> list[torch.Tensor]:
    results = results if isinstance(results, tuple | list) else [results]
    return [torch.as_tensor(result).detach() for result in results]


def near(results: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(results), tensors(expected), strict=True))
    return all(
        one.shape == other.shape
        and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for one, other in pairs
    )


def shown(text: str, backend: str) -> str:
    """Return the first line of a message, without parts that differ between runs or backends."""
    text = text.replace(f"'{backend}'", "'…'")
    line = re.sub(r"0x[0-9a-f]+", "0x…", text.strip().splitlines()[0] if text.strip() else "")
    return line if len(line) <= 180 else line[:177] + "…"


def judge(line: Line, backend: str) -> tuple[bool, str]:
    """Return whether the behaviour is as required, and a description of it."""
    must = line.must
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fastkd.use_backend(backend):
                results = line.call()
    except BaseException as error:  # SystemExit too
        happened = f"{type(error).__name__}: {shown(str(error), backend)}"
        if isinstance(must, Refused):
            # A subclass would hide an error that a user cannot catch by the documented name.
            fits = type(error) is must.kind or (must.kind is Exception and isinstance(error, Exception))
            return fits and re.search(must.pattern, str(error)) is not None, happened
        return False, happened
    if isinstance(must, Refused):
        return False, f"no error: {shown(str(results), backend)}"
    if must.holds is not None:
        good = must.holds(results)
    else:
        assert must.expected is not None
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
        with fastkd.use_backend("eager"):
            good = near(results, must.expected())
    return good, must.words if good else f"instead: {shown(str(results), backend)}"


def run(line: Line, backend: str) -> tuple[bool, str]:
    """Run ``judge`` in its own process, except with CUDA, which does not survive a fork."""
    if torch.cuda.is_available():
        return judge(line, backend)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive the fork either
            with os.fdopen(writer, "w") as pipe:
                json.dump(judge(line, backend), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False, f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    good, happened = json.loads(said)
    return good, happened


HEAD = """# Bad inputs

What fastkd does with inputs that are wrong or unusual, on each backend that runs without a GPU. The last
column is what the tests observed (`tests/test_bad_inputs.py`), one entry if the backends agree. Written by
`python tests/bad_inputs.py > docs/bad-inputs.md`.
"""


def page() -> tuple[str, int]:
    """Return the table, and how many entries are wrong."""
    from tests.bad_input_lines import LINES

    text, wrong, group = [HEAD], 0, None
    for line in LINES:
        if line.group != group:
            group = line.group
            text += [f"\n## {group}\n", "| input | what must happen | what happened |", "|---|---|---|"]
        happened: dict[str, list[str]] = {}
        for backend in line.backends:
            good, words = run(line, backend)
            wrong += not good
            happened.setdefault(words if good else f"**wrong**: {words}", []).append(backend)
        observed = "; ".join(
            words if len(happened) == 1 else f"{', '.join(names)}: {words}"
            for words, names in happened.items()
        )
        cells = (line.input, str(line.must), observed)
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n", wrong


if __name__ == "__main__":
    from tests.bad_inputs import page as written  # the module that the lines import, not this copy of it

    table, wrong = written()
    print(table, end="")
    if wrong:
        print(f"{wrong} entries are wrong", file=sys.stderr)
    sys.exit(1 if wrong else 0)
