"""Every line of docs/bad-inputs.md, on every backend that runs here."""

import pytest

from tests.bad_input_lines import LINES
from tests.bad_inputs import run


@pytest.mark.parametrize(
    ("line", "backend"),
    [pytest.param(line, backend, id=f"{line.name}-{backend}") for line in LINES for backend in line.backends],
)
def test_what_must_happen(line, backend):
    good, happened = run(line, backend)
    assert good, f"must: {line.must}; happened: {happened}"


def test_line_names_are_unique():
    names = [line.name for line in LINES]
    assert len(set(names)) == len(names)
