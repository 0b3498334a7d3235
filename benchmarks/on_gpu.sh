#!/usr/bin/env bash
# Everything that wants a GPU, in one go and within about nine minutes: the tests with every kernel compiled on it,
# `fastkd check`, the accuracy table, the benchmark suite, training steps, the trainer's throughput, the report.
#
#     benchmarks/on_gpu.sh FOLDER
#
# Run from the repository's root with torch and triton importable, pytest for the tests, and torchvision and pydantic for
# the throughput; what is missing fails by itself, and the rest goes on.
# Results go to FOLDER, which must not exist yet. Commit FOLDER's .jsonl files under benchmarks/results/.
set -u
out=${1:?usage: benchmarks/on_gpu.sh FOLDER}
mkdir "$out" || exit 1
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1

status=0
run() { # run NAME SECONDS COMMAND...: for so long at most; output and exit status go to the folder
  local name=$1 limit=$2
  shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.err"
  echo $? > "$out/$name.status"
}
tell() { # tell NAME...: the end of each one's output; remembers a failure
  local name code
  for name in "$@"; do
    code=$(cat "$out/$name.status")
    echo "== $name (exit status $code, now at $SECONDS s)"
    tail -n 15 "$out/$name.txt"
    [ "$code" = 0 ] || { status=1; echo "   failed, see $out/$name.err"; tail -n 5 "$out/$name.err"; }
  done
}
left() { # left SECOND: how long it is until this second of the script, ten at least
  local rest=$(($1 - SECONDS))
  echo $((rest > 10 ? rest : 10))
}

# What is right or wrong, side by side: most of it is compiling kernels.
run doctor 60 python3 -c "from fastkd import doctor; print(doctor.report())" &
run check 200 python3 -m fastkd.check &
run accuracy 200 python3 benchmarks/accuracy.py &
run tests 200 python3 -m pytest tests/losses/test_losses.py tests/ops/test_operators.py -q -p no:warnings -k cuda &
wait
tell doctor check accuracy tests

# What is timed, alone. First what users have most, with torch.compile; then every case without it, for compiling
# them all would take half an hour.
run suite "$(left 380)" python3 -m fastkd.bench --device cuda --dtypes bfloat16 --passes forward+backward \
  --shapes 256x1000 8192x1000 128x21841 2048x131072 256x1000000 8192x131072 --seconds 0.3 \
  --time-limit "$(left 340)" --output "$out/suite.jsonl"
tell suite
run steps "$(left 420)" python3 -m fastkd.bench --device cuda --step --seconds 0.2 --output "$out/steps.jsonl"
tell steps
run throughput "$(left 495)" python3 benchmarks/throughput.py --device cuda --steps 30 --turns 5 \
  --output "$out/throughput.jsonl"
tell throughput
run all "$(left 540)" python3 -m fastkd.bench --device cuda --peers native triton eager liger quack \
  --seconds 0.1 --time-limit "$(left 525)" --output "$out/all.jsonl"
tell all

files=()
for name in suite all steps; do
  [ -s "$out/$name.jsonl" ] && files+=("$out/$name.jsonl")
done
run report 60 python3 -m fastkd.bench --report "${files[@]}" --output "$out/report"
tell report
exit $status
