"""Bad inputs to the trainer, and what happens.

`python -m tests.train.bad_inputs > docs/trainer-bad-inputs.md` makes a table of it. ROWS are (input, what
must happen, function that tries it in an empty working directory and returns what happened).
`test_bad_inputs.py` runs each.
"""

from __future__ import annotations

from .arrays import ARRAYS
from .common import NotTriedError, Row, happened
from .disk import DISK
from .files import OTHER_FILES
from .images import IMAGES
from .limits import LIMITS
from .models import ROWS as OF_MODELS
from .recipes import RECIPES
from .resuming import RESUME

__all__ = ["ROWS", "NotTriedError", "happened"]

ROWS: list[Row] = [*RECIPES, *IMAGES, *ARRAYS, *RESUME, *OTHER_FILES, *DISK, *OF_MODELS, *LIMITS]
