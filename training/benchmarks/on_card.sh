#!/usr/bin/env bash
# Everything that a graphics card is needed for, within eight minutes: the tests, the benchmark's quick table, and the
# demo of digits. It installs nothing. Each part has a limit of time, and a failure of one does not stop the others.
#
#   bash training/benchmarks/on_card.sh [FOLDER]
#
# The logs and results are written to FOLDER, or to a new temporary folder. PYTHON names another interpreter (python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

python=${PYTHON:-python3}
results=${1:-$(mktemp -d)}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
echo "results: $results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1

summary=()
failed=0

# Run a command with a limit of seconds; its output goes to NAME.log.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0 word
  shift 2
  echo "== $name (at most $limit s)"
  # SIGINT lets training save a checkpoint
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
  case $status in
    0) word=passed ;;
    124 | 137) word="stopped after $limit s" ;;
    *) word="failed with status $status" ;;
  esac
  [ "$status" = 0 ] || failed=1
  tail -n 60 "$results/$name.log" | sed 's/.*\r//'  # of a bar, its last state
  summary+=("$name: $word, $((SECONDS - start)) s")
}

"$python" - <<'PYTHON' | tee "$results/machine.txt"
import torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
print(f"torch {torch.__version__}, {card}")
PYTHON

# its own limit lets pytest report its failures so far
part tests 160 env DDPM_HF_TEST_SECONDS=140 "$python" -m pytest tests/test_cuda.py -vv -n 0 --durations=10
while read -r line; do
  summary+=("tests: $line")
done < <(grep -E '^(FAILED|ERROR) |^!.* is over|^=.* in [0-9.]+s' "$results/tests.log" | tr -d '!=' | cut -c 1-200)
part digits 75 "$python" training/train.py --config training/configs/digits.yaml --output_dir "$results/digits"
# the benchmark has the rest of the time, and names what does not fit
limit=$((470 - SECONDS))
minutes=$(awk "BEGIN { print ($limit - 40) / 60 }")
part benchmark "$limit" "$python" training/benchmarks/benchmark.py --device "${DEVICE:-cuda}" --only card --quick \
  --minutes "$minutes" --output_dir "$results/benchmark"

if [ -f "$results/digits/metrics.jsonl" ]; then
  steps=$("$python" - "$results/digits" <<'PYTHON'
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
done = max(line["step"] for line in lines)
text = f"{done:,} steps logged"
record = folder / "pipeline" / "training.json"
if record.is_file():
    facts = json.loads(record.read_text())
    seconds = facts.get("seconds")
    if seconds:
        text = f"{facts['steps']:,} steps in {seconds:.1f} s, {facts['steps'] / seconds:.0f} a second, looks included"
fid = [line["eval/fid"] for line in lines if "eval/fid" in line]
print(text + (f"; FID of pixels {fid[-1]:.3g}" if fid else ""))
PYTHON
  )
  summary+=("digits: $steps")
fi

{
  cat "$results/machine.txt"
  printf '%s\n' "${summary[@]}"
  echo "total: $SECONDS s"
} | tee "$results/summary.txt"
exit "$failed"
