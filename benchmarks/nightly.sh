#!/usr/bin/env bash
# Measures, adds the rows to a history and holds them against the last run of the same
# command on the same processor:
#
#     benchmarks/nightly.sh FILE.jsonl [options of python -m shardinit.bench]
#
# It ends with 1 where a row is worse than the spread of its runs explains.
set -euo pipefail

history=${1:?"FILE.jsonl to keep the history in"}
shift
before=$(grep -cs . "$history" || true)
python -m shardinit.bench --history "$history" "$@"
if [ "${before:-0}" -gt 0 ]; then
  python -m shardinit.bench compare "$history"
else
  echo "the first run of a history"
fi
