#!/usr/bin/env bash
# Everything that wants a GPU, in one go: the tests with every kernel compiled on it, the accuracy table, the timings.
#
#     benchmarks/on_gpu.sh FOLDER
#
# Run from the repository's root with torch and triton importable; results go to FOLDER, which must not exist yet.
# About ten minutes on one GPU. Commit FOLDER's .jsonl files under benchmarks/results/.
set -u
out=${1:?usage: benchmarks/on_gpu.sh FOLDER}
mkdir "$out" || exit 1
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1

status=0
step() { # step NAME COMMAND...: runs it, keeps its output, goes on after a failure and remembers it
  local name=$1
  shift
  echo "== $name: $*"
  "$@" > "$out/$name.txt" 2> "$out/$name.err" || { status=1; echo "   failed, see $out/$name.err"; }
  tail -n 15 "$out/$name.txt"
}

step doctor python3 -c "from fastkd.ops import doctor; print(doctor.report())"
step tests python3 -m pytest tests/test_losses.py tests/test_operators.py -q -p no:warnings -k cuda
step accuracy python3 benchmarks/accuracy.py
backends=triton
if python3 -c "from fastkd.ops import native; raise SystemExit(native.missing('cuda'))"; then backends="triton native"; fi
for backend in $backends; do
  for dtype in bfloat16 float32; do
    step "losses-$backend-$dtype" env FASTKD_BACKEND="$backend" \
      python3 benchmarks/losses.py --dtype "$dtype" --output "$out/losses-$backend-$dtype.jsonl"
  done
done
exit $status
