"""The lines of docs/bad-inputs.md: an input, what must happen, and the call that tries it."""

from . import linear, logits, process, values

LINES = [*logits.LINES, *linear.LINES, *values.LINES, *process.LINES]
