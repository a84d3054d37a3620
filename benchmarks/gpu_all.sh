#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: tests/gpu and the benchmarks, from the source tree.
#
#   benchmarks/gpu_all.sh [FOLDER]      default: benchmarks/results
#
# First what time does not matter to, side by side: tests, peaks, recordings, and the compilation of every kernel. Then,
# alone, what is timed. DEADLINE: seconds after which everything is stopped (600). Each table says what is missing.
# Writes one text file for each, headed by the machine and the command. PYTHON names the interpreter (torch with CUDA,
# transformers, typer, rich, pyyaml, nvidia-ml-py, scikit-learn, pytest, hypothesis); nothing needs to be installed.
# Exit code: 0 when all passed, or when there is no CUDA device and nothing could be measured; 1 otherwise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
FOLDER=${1:-benchmarks/results}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "not measured: $PYTHON has no torch that sees a CUDA device; run this on a machine with an NVIDIA GPU"
  exit 0
fi

MACHINE=$("$PYTHON" - <<'EOF'
import platform

import torch
import transformers

from memadvise import __version__
from memadvise.memory.device import device_facts

for fact in device_facts():
    total = fact["total_bytes"] / 2**30
    print(f"gpu:      {fact['name']}, {total:.1f} GiB, driver {fact['driver']} (CUDA {fact['cuda_driver']})")
print(f"versions: memadvise {__version__}, torch {torch.__version__} (CUDA {torch.version.cuda}, cuDNN "
      f"{torch.backends.cudnn.version()}), transformers {transformers.__version__}, Python {platform.python_version()}")
EOF
)
mkdir -p "$FOLDER" || exit 1
DEADLINE=${DEADLINE:-600}
KERNELS=$(mktemp -d)
trap 'rm -rf "$KERNELS"' EXIT

# run NAME SECONDS COMMAND...: its output, headed, in FOLDER/NAME.txt; NAME.failed beside it if it did not pass
run() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  local left=$((DEADLINE - SECONDS))
  [ "$limit" -le "$left" ] || limit=$left
  rm -f "$FOLDER/$name.failed"
  {
    echo "command:  $*"
    echo "$MACHINE"
    echo "date:     $(date -u +%Y-%m-%d)"
    echo
    if [ "$limit" -lt 5 ]; then
      echo "not run: $DEADLINE s are over"
      status=124
    else
      timeout --kill-after=5 "$limit" "$@" 2>&1
      status=$?
      [ "$status" -ne 124 ] || echo "stopped after $limit s"
    fi
    echo
    echo "exit code $status after $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || touch "$FOLDER/$name.failed"
  } >"$FOLDER/$name.txt"
  echo "$name: $(tail -n 1 "$FOLDER/$name.txt")"
}

STEP_TIME=("$PYTHON" benchmarks/step_time.py --device cuda --no-peers --cache "$KERNELS")

# The kernels of some rows, which take long to compile; the figures of these runs mean nothing.
compile() {
  local dtype=$1 row
  shift
  for row in "$@"; do
    timeout --kill-after=5 120 "${STEP_TIME[@]}" --dtype "$dtype" --rounds 7 --only "$row" '!chunked'
  done >>"$FOLDER/gpu_compile.txt" 2>&1
}

SPREAD=(-s)
"$PYTHON" -c 'import xdist' 2>/dev/null && SPREAD=(-n 8 --dist load)
run gpu_tests 290 "$PYTHON" -m pytest -m gpu tests/gpu -q --tb=short "${SPREAD[@]}" -p no:cacheprovider \
  --deselect tests/gpu/test_seven_billion_cuda.py &
run gpu_seven_billion 290 "$PYTHON" -m pytest -m gpu tests/gpu/test_seven_billion_cuda.py -q -s -p no:cacheprovider &
run gpu_estimate_families 290 "$PYTHON" benchmarks/estimate_accuracy.py --device cuda --only family &
run gpu_estimate_examples 290 "$PYTHON" benchmarks/estimate_accuracy.py --device cuda --only digits text hf &
run gpu_cudnn 200 "$PYTHON" benchmarks/record_cudnn.py --write "$FOLDER/gpu_cudnn.json" &
run gpu_allocator 290 "$PYTHON" benchmarks/record_allocator.py --write "$FOLDER/allocator" &
rm -f "$FOLDER/gpu_compile.txt"
compile float32 came 'adamw int8' &
compile float32 adafactor '[1] + int8' 'adam_mini heads' &
compile float32 'adamw cautious' 'slimadam axes' 'adam_mini row' lion sgd &
compile bfloat16 'slimadam axes [1]' 'weights stochastic' &
wait
run gpu_step_time 110 "${STEP_TIME[@]}" --seconds 95 --only '!chunked' '!for-loop'
run gpu_step_time_bf16 40 "${STEP_TIME[@]}" --dtype bfloat16 --seconds 30 --only 'slimadam axes [1]' \
  'weights stochastic' '!chunked'
run gpu_shadow_cost 30 "$PYTHON" benchmarks/shadow_cost.py --device cuda
run gpu_scaling 50 "$PYTHON" benchmarks/scaling.py --device cuda --seconds 35

echo
if compgen -G "$FOLDER/*.failed" >/dev/null; then
  echo "not passed: $(basename -as .failed "$FOLDER"/*.failed | tr '\n' ' ')see $FOLDER"
  rm -f "$FOLDER"/*.failed
  exit 1
fi
echo "all passed; see $FOLDER"
