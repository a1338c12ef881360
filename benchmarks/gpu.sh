#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes and without a network: the tests marked `gpu`, then the
# benchmarks on CUDA. Each step has a time limit of its own, so that one that fails or hangs leaves the others theirs.
# Results go to benchmarks/results/; the JSON and a log of everything also to $OUT if it is set. PYTHON=python3.12
# chooses the interpreter, QUICK=1 takes small shapes. Exits 2 without a GPU, 1 if a step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu.sh: no interpreter $python; set PYTHON to one with torch" >&2; exit 2; }
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu.sh: $python finds no torch with a CUDA device; run this on a machine with a GPU" >&2
  exit 2
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
results=benchmarks/results
out=${OUT:-$results}
mkdir -p "$results" "$out"
log=$out/gpu.log
: >"$log"
summary=()
failed=0

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 started=$SECONDS verdict=ok code
  shift 2
  echo "== $name (at most $limit s)" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    verdict="out of time"
  elif [ "$code" -ne 0 ]; then
    verdict="failed ($code)"
  fi
  [ "$verdict" = ok ] || failed=1
  summary+=("$(printf '%-18s %-14s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}

# bench NAME SECONDS: run.py stops by itself, with what it has, 20 seconds before its limit.
bench() {
  step "$1" "$2" "$python" benchmarks/run.py "$1" --device cuda --rounds 1 --repeats 5 --seconds $(($2 - 20)) \
    ${QUICK:+--quick}
  [ "$out" = "$results" ] || cp "$results/$1-cuda.json" "$out/"
}

# The sum of the limits is 590 seconds.
mapfile -t tests < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests)
step tests 150 "$python" -m pytest -q -m gpu "${tests[@]}"
bench mixing_distance 80
bench kd_loss 160
bench ssd 60
bench kd_accuracy 30
bench delta_rule 40
bench delta_distance 30
bench kd_sweeps 40

printf '%s\n' '' "${summary[@]}" | tee -a "$log"
exit $failed
