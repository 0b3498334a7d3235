"""The lines of docs/bad-inputs.md: an input, what must happen, and the call that tries it."""

from . import logits, process, values

LINES = [*logits.LINES, *values.LINES, *process.LINES]
