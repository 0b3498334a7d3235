"""The lines of docs/bad-inputs.md: an input, what must happen, and the call that tries it."""

from . import linear, logits, process, sharded, top_k, values

LINES = [*logits.LINES, *linear.LINES, *top_k.LINES, *sharded.LINES, *values.LINES, *process.LINES]
