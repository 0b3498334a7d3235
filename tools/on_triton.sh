#!/usr/bin/env bash
# Binds and compiles the Triton kernels, and checks spills, budgets and baselines, with a given release of Triton.
#
#     tools/on_triton.sh 3.6.0
#
# Uses .venv/bin/python; about an hour on one core. Installs the release to a temporary folder, without dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
release=${1:?usage: tools/on_triton.sh RELEASE}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python -m pip install --quiet --no-deps --target "$folder" "triton==$release"
export PYTHONPATH="$folder"
.venv/bin/python tools/jit_launches.py --bind --compile 2
.venv/bin/python tools/kernel_report.py --check
.venv/bin/python tools/compile_kernels.py
