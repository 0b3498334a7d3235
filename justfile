# The commands that people use; `just` lists them. https://just.systems

export OMP_NUM_THREADS := env("OMP_NUM_THREADS", "1")

_list:
    @just --list --unsorted

# set up .venv with the tests' packages, and build the native backend
setup:
    python3 -m venv .venv
    .venv/bin/pip install -e '.[test]'

# build the native backend again, after a change in csrc/
build:
    .venv/bin/pip install --no-deps -e .

# run the tests in two processes, or those of a path
test *paths:
    .venv/bin/pytest -n 2 --dist worksteal {{ paths }}

# run the tests whose names fit, such as `just one "jsd and native"`
one pattern *paths:
    .venv/bin/pytest -q -k '{{ pattern }}' {{ paths }}

# lint, formatting and types
lint:
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy

# format the Python files
format:
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .

# every loss on every backend of this machine against float64
check *arguments:
    .venv/bin/fastkd check {{ arguments }}

# time the losses beside their peers
bench *arguments="--quick":
    .venv/bin/fastkd bench {{ arguments }}

# the documentation site at http://127.0.0.1:8000, rebuilt at each change (extra [docs])
docs:
    .venv/bin/mkdocs serve

# all that has to pass, in a fresh environment
ci:
    .ci/run
