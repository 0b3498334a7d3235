"""A line of figures that fits its terminal: the least important parts are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BAR = (10, 40)  # smallest and largest width
_GAP = "  "


@dataclass(frozen=True)
class Part:
    """Parts with the largest ``drop`` are left out first, those with 0 never."""

    text: str
    drop: int = 0
    style: str = ""


def figures_of(
    loss: float, terms: Mapping[str, float], accuracy: float, *, accuracy_drop: int = 0
) -> list[Part]:
    """Loss, its terms if there are several, and training accuracy."""
    parts = [Part(f"loss {loss:.3f}", drop=4)]
    if len(terms) > 1:
        parts.append(
            Part("(" + ", ".join(f"{name} {value:.3f}" for name, value in terms.items()) + ")", drop=6)
        )
    return [*parts, Part(f"train {accuracy:.2%}", drop=accuracy_drop)]


def fitting(parts: Sequence[Part], width: int) -> list[Part]:
    """The parts that fit into ``width``; those with ``drop`` 0 even if they do not."""
    kept = [part for part in parts if part.text]
    while len(joined(kept)) > width and any(part.drop for part in kept):
        least = max(range(len(kept)), key=lambda number: (kept[number].drop, number))
        del kept[least]
    return kept


def joined(parts: Sequence[Part]) -> str:
    return styled(parts).plain


def styled(parts: Sequence[Part]) -> Text:
    line = Text()
    for part in parts:
        if part.text:
            # Terms in brackets belong to the figure before them.
            line.append((" " if part.text.startswith("(") else _GAP) if line else "")
            line.append(part.text, part.style or None)
    return line


class ProgressLine(ProgressColumn):
    """Epoch, bar and ``parts`` in one line, which never wraps."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._of = console
        self.parts: Sequence[Part] = []

    def render(self, task: Task) -> RenderableType:
        width = self._of.width - 1  # some terminals wrap a full line
        room = width - len(task.description) - _BAR[0] - 2 * len(_GAP)
        text = styled(fitting(self.parts, max(room, 0)))
        bar = min(_BAR[1], _BAR[0] + max(room - len(text), 0))
        line = Table.grid(padding=(0, len(_GAP), 0, 0), collapse_padding=True, pad_edge=False)
        for _ in range(3):
            line.add_column(no_wrap=True, overflow="crop")
        line.add_row(
            Text(task.description),
            ProgressBar(total=task.total, completed=task.completed, width=bar, pulse=task.total is None),
            text,
        )
        return line
