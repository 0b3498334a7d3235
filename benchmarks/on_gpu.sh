#!/usr/bin/env bash
# Everything that needs a GPU, in a limited time: the tests with every kernel compiled, `fastkd check`, the
# accuracy table, the benchmark suite, native beside Triton by shape, both with other plans, losses in compiled code,
# training steps, the trainer's throughput, the cost of each method, the losses of linear layers, the report.
#
#     benchmarks/on_gpu.sh FOLDER [SECONDS]           # 540 seconds unless said otherwise; 240 are enough for a look
#     KERNELS=KERNELS.tar.xz benchmarks/on_gpu.sh …   # with kernels from tools/compile_ahead.py: no compilation
#
# Run from the repository's root with torch and Triton; what a step lacks (pytest, torchvision, pydantic) fails that
# step only. Correctness comes first and takes at most 40 % of the time; each step writes its own files, so that a
# later failure or the end of the time loses nothing. Results go to FOLDER, which must not exist yet. Commit its
# .jsonl files under benchmarks/results/. The last step prints the tables for the docs, and NATIVE_CLASSES of
# fastkd/ops/plan.py as measured.
#
# DRY=1 runs every step on a CPU: the same commands, of which later options make the work small. The tests are
# collected, and the Triton kernels of each loss compiled for a GPU and launched into a stub of its driver.
set -u
out=${1:?usage: benchmarks/on_gpu.sh FOLDER [SECONDS]}
total=${2:-540}
device=cuda
case "${DRY:-0}" in
  0) ;;
  1) device=cpu; export OMP_NUM_THREADS=1 TRITON_INTERPRET=0 ;;
  *) echo "the environment's DRY is '$DRY'; expected 1, 0 or nothing" >&2; exit 2 ;;
esac
mkdir "$out" || exit 1
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1

status=0
run() { # run NAME SECONDS COMMAND...: with this time limit; output and exit status go to the folder
  local name=$1 limit=$2
  shift 2
  timeout --signal INT --kill-after 10 "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.err"
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
dry() { # dry OPTION...: these options in a dry run, as the array `extra`; of two equal options the later one holds
  extra=()
  [ "$device" = cuda ] || extra=("$@")
}
until_share() { # until_share PERCENT: the seconds until this share of the time, at least five
  local rest=$((total * $1 / 100 - SECONDS))
  echo $((rest > 5 ? rest : 5))
}
bench() { # bench NAME PERCENT OPTION...: `fastkd bench` that starts no case after this share of the time
  local name=$1 limit
  limit=$(until_share "$2")
  shift 2
  run "$name" $((limit + 20)) python3 -m fastkd.bench --device $device "$@" --time-limit "$limit" \
    --output "$out/$name.jsonl" "${extra[@]}"
  show "$name"
}

if [ -n "${KERNELS:-}" ]; then
  run unpack 60 python3 tools/compile_ahead.py unpack "$KERNELS"
  show unpack
fi

# Correctness. Most of its time is compilation: in parallel, on as many processes as there are cores.
cores=$(nproc)
spread=()
python3 -c "import xdist" 2> /dev/null && spread=(-n $((cores > 3 ? cores - 3 : 1)) --dist worksteal)
limit=$(until_share 40)
run doctor 60 python3 -c "from fastkd import doctor; print(doctor.report())" &
dry --losses kd_loss
OMP_NUM_THREADS=1 run check "$limit" python3 -m fastkd.check "${extra[@]}" &
dry kd jsd
OMP_NUM_THREADS=1 run accuracy "$limit" python3 benchmarks/accuracy.py "${extra[@]}" &
# The tests whose names say that they run on a GPU, and those of the launcher, which do wherever there is one.
dry --collect-only
OMP_NUM_THREADS=1 run tests "$limit" python3 -m pytest tests/losses tests/ops -q "${spread[@]}" \
  --ignore tests/ops/test_cuda_kernels.py --ignore tests/ops/test_cuda_top_k.py \
  -k "native-cuda or triton-cuda or test_cuda_ or test_triton_launch or test_triton_top_k" "${extra[@]}" &
wait
show doctor check accuracy tests
if [ $device = cpu ]; then
  run kernels "$limit" python3 tools/jit_launches.py --compile 1 --target sm_90
  show kernels
fi

# Timings, one at a time. First the most common cases, with every peer; then native beside Triton at the shapes where
# `auto` may choose between them (fastkd/ops/plan.py); then training; then every case without torch.compile, which
# takes half an hour for all of them.
dry --shapes 16x100 --losses kd jsd --peers native triton eager liger quack --seconds 0.01
bench suite 56 --dtypes bfloat16 --passes forward+backward --losses kd dkd binary-kl-norm ce-kd jsd \
  --shapes 256x1000 8192x1000 8192x32768 2048x131072 256x1000000 --seconds 0.3
dry --shapes 16x100 --losses kd jsd --seconds 0.01
bench paths 64 --dtypes bfloat16 --passes forward+backward --peers native triton \
  --losses kd dkd ce-kd binary-kl-norm lskd jsd --seconds 0.1 \
  --shapes 8192x32768 4096x131072 256x1000000 4x1000000 2048x21841 128x21841 64x131072 2048x8192 2048x4096 1024x100
dry --device cpu --shapes 16x100 --losses kd --seconds 0.01
run plans $(($(until_share 72) + 20)) python3 benchmarks/plans.py --time-limit "$(until_share 72)" --seconds 0.2 \
  --losses kd dkd ce-kd binary-kl-norm lskd jsd --device $device --output "$out/plans.jsonl" "${extra[@]}"
show plans
dry --shapes 16x100 --losses kd --seconds 0.01
bench compiled 75 --dtypes bfloat16 --passes forward+backward --peers fastkd-compiled fastkd-in-place \
  --losses kd dkd --shapes 8192x32768 8192x1000 --seconds 0.2
dry --steps glyph-2263 --batch 2 --peers eager
run steps "$(until_share 78)" python3 -m fastkd.bench --device $device --step --seconds 0.2 \
  --output "$out/steps.jsonl" "${extra[@]}"
show steps
dry --size 32 --batch 2 --steps 1 --warm-up 1 --turns 1
run throughput "$(until_share 87)" python3 benchmarks/throughput.py --device $device --steps 30 --turns 5 \
  --output "$out/throughput.jsonl" "${extra[@]}"
show throughput
dry --pair resnet32x4-resnet8x4 --batch 2 --turns 1
run methods "$(until_share 91)" python3 benchmarks/cost_of_methods.py --device $device \
  --time-limit "$(until_share 90)" --output "$out/methods.jsonl" "${extra[@]}"
show methods
dry --shapes 16x100 --losses kd
bench forms 95 --forms --losses kd ce --dtypes bfloat16 --seconds 0.1
dry --shapes 16x100 --losses kd
bench all 98 --peers native triton eager liger quack --seconds 0.1

files=()
for name in suite paths compiled all steps forms; do
  [ -s "$out/$name.jsonl" ] && files+=("$out/$name.jsonl")
done
run report 60 python3 -m fastkd.bench --report "${files[@]}" --output "$out/report"
show report
[ -s "$out/report/report.md" ] && cat "$out/report/report.md"
exit $status
