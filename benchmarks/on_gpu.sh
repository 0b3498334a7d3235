#!/usr/bin/env bash
# Everything that needs a GPU, in about nine minutes: the tests with every kernel compiled,
# `fastkd check`, the accuracy table, the benchmark suite, training steps, the trainer's throughput, the cost of each
# method, the report.
#
#     benchmarks/on_gpu.sh FOLDER
#
# Run from the repository's root with torch and triton, pytest for the tests, and torchvision and pydantic for the
# throughput; a missing package fails only its own part.
# Results go to FOLDER, which must not exist yet. Commit FOLDER's .jsonl files under benchmarks/results/.
set -u
out=${1:?usage: benchmarks/on_gpu.sh FOLDER}
mkdir "$out" || exit 1
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1

status=0
run() { # run NAME SECONDS COMMAND...: with this time limit; output and exit status go to the folder
  local name=$1 limit=$2
  shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.err"
  echo $? > "$out/$name.status"
}
show() { # show NAME...: prints the end of each output, records failures in `status`
  local name code
  for name in "$@"; do
    code=$(cat "$out/$name.status")
    echo "== $name (exit status $code, now at $SECONDS s)"
    tail -n 15 "$out/$name.txt"
    [ "$code" = 0 ] || { status=1; echo "   failed, see $out/$name.err"; tail -n 5 "$out/$name.err"; }
  done
}
left() { # left SECOND: the time until this second of the script, at least ten
  local rest=$(($1 - SECONDS))
  echo $((rest > 10 ? rest : 10))
}

# Correctness, in parallel: most of the time is compilation.
run doctor 60 python3 -c "from fastkd import doctor; print(doctor.report())" &
run check 200 python3 -m fastkd.check &
run accuracy 200 python3 benchmarks/accuracy.py &
run tests 200 python3 -m pytest tests/losses/test_losses.py tests/losses/test_linear.py tests/losses/test_centering.py \
  tests/ops/test_operators.py tests/ops/test_aliasing.py -q -p no:warnings -k cuda &
wait
show doctor check accuracy tests

# Timings, one at a time. First the most common cases, with torch.compile; then every case without it, because compiling
# all of them would take half an hour.
run suite "$(left 360)" python3 -m fastkd.bench --device cuda --dtypes bfloat16 --passes forward+backward \
  --shapes 256x1000 8192x1000 128x21841 2048x131072 256x1000000 8192x131072 --seconds 0.3 \
  --time-limit "$(left 320)" --output "$out/suite.jsonl"
show suite
run steps "$(left 400)" python3 -m fastkd.bench --device cuda --step --seconds 0.2 --output "$out/steps.jsonl"
show steps
run throughput "$(left 475)" python3 benchmarks/throughput.py --device cuda --steps 30 --turns 5 \
  --output "$out/throughput.jsonl"
show throughput
run methods "$(left 500)" python3 benchmarks/cost_of_methods.py --device cuda --time-limit 12 --output "$out/methods.jsonl"
show methods
run forms "$(left 525)" python3 -m fastkd.bench --device cuda --forms --losses kd ce --dtypes bfloat16 --seconds 0.1 \
  --time-limit 15 --output "$out/forms.jsonl"
show forms
run all "$(left 540)" python3 -m fastkd.bench --device cuda --peers native triton eager liger quack \
  --seconds 0.1 --time-limit "$(left 525)" --output "$out/all.jsonl"
show all

files=()
for name in suite all steps forms; do
  [ -s "$out/$name.jsonl" ] && files+=("$out/$name.jsonl")
done
run report 60 python3 -m fastkd.bench --report "${files[@]}" --output "$out/report"
show report
exit $status
