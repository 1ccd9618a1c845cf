#!/usr/bin/env bash
# Tests and measures shardinit on the devices of this machine, without a network:
#
#     benchmarks/accelerator.sh PYTHON PLATFORM
#
# PYTHON has JAX for PLATFORM (cuda, tpu or cpu), Flax, optax, Orbax and pytest; what else is
# needed lies as wheels in ./wheels (make wheels). Results go to $OUT, ./accelerator
# without it. It ends within eight minutes: what takes longer is stopped, and said to be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1 platform=$2 out=${OUT:-accelerator}
mkdir -p "$out"
# Beside the machine's own packages, whatever environment they are in.
packages=$PWD/.accelerator
if [ ! -e "$packages/.ready" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$packages" wheels/*.whl
  touch "$packages/.ready"
fi
export PYTHONPATH=$PWD:$packages SHARDINIT_TEST_PLATFORM=$platform
# Else JAX takes three quarters of a card at once, and its account says nothing of peaks.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

code=0
part() {  # part SECONDS NAME COMMAND...: runs it for so long at most, and goes on
  local limit=$1 name=$2 status=0
  shift 2
  printf '\n=== %s\n' "$name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" || status=$?
  if [ "$status" -ne 0 ]; then
    printf '!!! %s: exit %d%s\n' "$name" "$status" \
      "$([ "$status" = 124 ] && echo ", stopped after $limit s")" | tee -a "$out/failed.txt"
    code=1
  fi
}

rm -f "$out/failed.txt"
JAX_PLATFORMS=$platform "$python" -c 'import jax; print(jax.__version__, *{
  f"{d.platform}: {d.device_kind} x{len(jax.devices())}" for d in jax.devices()})' \
  | tee "$out/devices.txt"
part 120 tests "$python" -m pytest -p no:cacheprovider -m devices tests/devices
bench() {  # bench SECONDS NAME OPTIONS...
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$python" -m shardinit.bench --platform "$platform" \
    --json "$out/$name.json" --markdown "$out/$name.md" "$@"
}
bench 120 draws --case draws --repeats 1
bench 80 warm --case warm,memory --repeats 1
bench 80 cold --case cold --layers 4,16 --repeats 1
bench 80 large --case large --repeats 1
exit $code
