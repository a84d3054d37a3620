#!/usr/bin/env bash
# Everything that needs a GPU, within five minutes: tests/gpu and the benchmarks, from the source tree.
#
#   benchmarks/gpu_all.sh [FOLDER]      default: benchmarks/results
#
# DEADLINE: seconds after which nothing is started and everything is stopped (300). The tests run in eight processes
# where pytest-xdist is installed. What fits in the time is measured; each table says what is missing from it.
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
FAILED=()
DEADLINE=${DEADLINE:-300}

# run NAME SECONDS COMMAND...: its output, headed, in FOLDER/NAME.txt and here
run() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  local left=$((DEADLINE - SECONDS))
  if [ "$left" -lt 10 ]; then
    echo "$name: not run, $DEADLINE s are over" | tee "$FOLDER/$name.txt"
    FAILED+=("$name")
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  {
    echo "command:  $*"
    echo "$MACHINE"
    echo "date:     $(date -u +%Y-%m-%d)"
    echo
    timeout --kill-after=5 "$limit" "$@" 2>&1
    status=$?
    echo
    if [ "$status" -eq 124 ]; then echo "stopped after $limit s"; fi
    echo "exit code $status after $((SECONDS - start)) s"
    exit "$status"
  } | tee "$FOLDER/$name.txt"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || FAILED+=("$name")
}

SPREAD=(-s)
"$PYTHON" -c 'import xdist' 2>/dev/null && SPREAD=(-n 8 --dist load)
run gpu_tests 100 "$PYTHON" -m pytest -m gpu tests/gpu -q "${SPREAD[@]}" -p no:cacheprovider
run gpu_step_time 110 "$PYTHON" benchmarks/step_time.py --device cuda --no-peers --seconds 80 --only '!chunked'
run gpu_step_time_bf16 60 "$PYTHON" benchmarks/step_time.py --device cuda --no-peers --dtype bfloat16 --seconds 35 --only '!chunked'

run gpu_estimate_accuracy 80 "$PYTHON" benchmarks/estimate_accuracy.py --device cuda --few
run gpu_allocator 60 "$PYTHON" benchmarks/record_allocator.py --write "$FOLDER/allocator"
run gpu_shadow_cost 25 "$PYTHON" benchmarks/shadow_cost.py --device cuda
run gpu_scaling 50 "$PYTHON" benchmarks/scaling.py --device cuda --seconds 30

echo
if [ ${#FAILED[@]} -gt 0 ]; then
  echo "not passed: ${FAILED[*]}; see $FOLDER"
  exit 1
fi
echo "all passed; see $FOLDER"
