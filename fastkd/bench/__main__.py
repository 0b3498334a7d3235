"""``python -m fastkd.bench``: the command ``fastkd bench`` from a checkout."""

import sys

from fastkd.bench.command import main

sys.exit(main())
