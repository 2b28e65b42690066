#!/usr/bin/env bash
# The first minutes on a GPU: benchmarks/gpu_day.sh training|inference [--dry] [DIRECTORY]
#
# Each half takes at most 5 minutes on an H100 and downloads nothing: weights are random. Its stages come in the order
# of their worth. Each writes its results into DIRECTORY (default: benchmarks/results/gpu_day) as soon as it has them,
# and is passed over where its file `done` is there, so that a second call goes on. With --dry all is tiny, for a CPU.
# PYTHON names the interpreter (default: python3).
set -uo pipefail

half=${1:-} dry=
shift || true
if [ "${1:-}" = --dry ]; then dry=yes && shift; fi
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/results/gpu_day}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
mkdir -p "$out"
# Two libraries share the device.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0 end=$((SECONDS + 285))

# stage NAME SECONDS COMMAND...: at most so many seconds, and not beyond the five minutes.
stage() {
  local name=$1 most=$2 left=$((end - SECONDS))
  shift 2
  if [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  if [ "$left" -lt 10 ]; then
    echo "== $name: not reached"
    failed=1
    return
  fi
  echo "== $name, $((most < left ? most : left)) s at most: $*"
  local began=$SECONDS
  timeout $((most < left ? most : left)) "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit status $status after $((SECONDS - began)) s"
  if [ "$status" = 0 ]; then touch "$out/$name.done"; else failed=1; fi
}

run() { # STAGE SECONDS MODULE FLAGS...
  local name=$1 most=$2 module=$3
  shift 3
  stage "$name" "$most" "$python" -m "$module" "$@"
}

doctor() { run doctor "$1" supra_jax.bin.doctor --output="$out/doctor.json"; }

case "$half$dry" in
  training)
    doctor 150
    run op 75 benchmarks.linear_attention --output="$out" --budget=0.2 \
      --shapes=8x2048x32x32x128,1x8192x96x96x128,4x2048x16x16x128,1x32768x32x8x128
    run step 90 benchmarks.train_step --output="$out" --preset=mistral_7b --layers=-1 --remat=block --tokens=2048 \
      --budget=5 --peers=torch
    run forms 60 benchmarks.tune_triton --output="$out" --shapes=8x2048x32x128 --seconds=50 --budget=0.05
    ;;
  inference)
    doctor 150
    run decode 150 benchmarks.decode --output="$out" --preset=mistral_7b --layers=8 --batches=1,16
    run long 60 benchmarks.decode --output="$out/long" --preset=mistral_7b --layers=8 --batches=1 --prompt=16384 \
      --contestants=supra_window,transformers
    ;;
  trainingyes)
    doctor 200
    run op 100 benchmarks.linear_attention --output="$out" --budget=0.1 --shapes=1x256x2x2x64
    run step 100 benchmarks.train_step --output="$out" --preset=tiny --remat=block --tokens=64 --budget=1 --peers=torch
    run forms 60 benchmarks.tune_triton --output="$out" --shapes=1x64x1x16 --seconds=20 --budget=0.05
    ;;
  inferenceyes)
    doctor 200
    run decode 100 benchmarks.decode --output="$out" --preset=tiny --batches=1,2 --prompt=32 --new_tokens=8
    ;;
  *)
    echo "usage: benchmarks/gpu_day.sh training|inference [--dry] [DIRECTORY]" >&2
    exit 2
    ;;
esac
exit $failed
