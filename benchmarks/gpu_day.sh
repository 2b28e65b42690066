#!/usr/bin/env bash
# The first minutes on a GPU: benchmarks/gpu_day.sh training|inference [--dry] [DIRECTORY]
#
# Each half takes at most 5 minutes on an H100 and downloads nothing: weights are random. Its stages come in the order
# of their worth. Each writes its results into DIRECTORY (default: benchmarks/results/gpu_day) as soon as it has them,
# and is passed over where its file NAME.done is there, so that a second call goes on. Compiled programs and doctor's
# verdict go into DIRECTORY/cache, unless XDG_CACHE_HOME says where. With --dry all is tiny, for a CPU, and goes into
# DIRECTORY/dry. PYTHON names the interpreter (default: python3).
set -uo pipefail

usage() {
  echo "usage: benchmarks/gpu_day.sh training|inference [--dry] [DIRECTORY]" >&2
  exit 2
}

half='' dry='' directory=''
for argument in "$@"; do
  case "$argument" in
    training | inference) [ -z "$half" ] && half=$argument || directory=$argument ;;
    --dry) dry=yes ;;
    -*) usage ;;
    *) [ -z "$directory" ] && directory=$argument || usage ;;
  esac
done
[ -n "$half" ] || usage
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
out=$(realpath -m -- "${directory:-$root/benchmarks/results/gpu_day}")${dry:+/dry}
python=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3}: no such program" >&2; exit 2; }
python=$(realpath -s -- "$python")
mkdir -p "$out" && cd "$root" || exit
# Two libraries share the device.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/cache}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$XDG_CACHE_HOME/jax}
failed=0 end=$((SECONDS + 285)) running=''

stop() {
  trap - INT TERM
  # `timeout` leads a group of its own, with all that a stage started.
  [ -n "$running" ] && kill -TERM -- "-$running" 2>/dev/null
  echo "== stopped" >&2
  exit 130
}
trap stop INT TERM

# run NAME SECONDS MODULE FLAGS...: a stage of at most so many seconds, and not beyond the five minutes.
run() {
  local name=$1 most=$2 module=$3 left=$((end - SECONDS)) status began=$SECONDS
  shift 3
  if [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  if [ "$left" -lt 10 ]; then
    echo "== $name: not reached"
    failed=1
    return
  fi
  most=$((most < left ? most : left))
  echo "== $name, $most s at most: python -m $module $*"
  setsid timeout -k 10 "$most" "$python" -m "$module" "$@" >"$out/$name.log" 2>&1 &
  running=$!
  wait "$running"
  status=$?
  running=''
  cat "$out/$name.log"
  echo "== $name: exit status $status after $((SECONDS - began)) s"
  # Doctor is done when it has judged, also if something is wrong.
  if [ "$status" = 0 ] || { [ "$name" = doctor ] && [ "$status" = 1 ] && grep -q '"choices"' "$out/doctor.json"; }; then
    touch "$out/$name.done"
  fi
  [ "$status" = 0 ] || failed=1
}

doctor() { run doctor "$1" supra_jax.bin.doctor --output="$out/doctor.json"; }

case "$half$dry" in
  training)
    doctor 150
    run op 60 benchmarks.linear_attention --output="$out" --budget=0.2 \
      --shapes=4x2048x16x16x128,8x2048x32x32x128,1x8192x96x96x128
    run step 90 benchmarks.train_step --output="$out" --preset=mistral_7b --layers=-1 --remat=block --tokens=2048 \
      --budget=5 --peers=torch
    run forms 60 benchmarks.tune_triton --output="$out" --shapes=8x2048x32x128 --seconds=40 --budget=0.05
    ;;
  inference)
    doctor 150
    run decode 150 benchmarks.decode --output="$out" --preset=mistral_7b --layers=8 --batches=1,16 \
      --contexts=2048 --prompts=2048
    run long 60 benchmarks.decode --output="$out/long" --preset=mistral_7b --layers=8 --batches=1 --contexts=16384 \
      --prompts=16384 --contestants=supra_window,transformers
    ;;
  trainingyes)
    doctor 250
    run op 100 benchmarks.linear_attention --output="$out" --budget=0.1 --shapes=1x256x2x2x64
    run step 100 benchmarks.train_step --output="$out" --preset=tiny --remat=block --tokens=64 --budget=1 --peers=torch
    run forms 60 benchmarks.tune_triton --output="$out" --shapes=1x64x1x16 --seconds=10 --budget=0.05
    ;;
  inferenceyes)
    doctor 250
    run decode 200 benchmarks.decode --output="$out" --preset=tiny --batches=1,2 --contexts=32 --prompts=32 \
      --turns=2 --seconds=0.1
    ;;
esac
exit $failed
