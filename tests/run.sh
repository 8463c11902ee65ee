#!/usr/bin/env bash
# The stages of `make test`, each timed, all run even when one fails: style, tests, notebooks (default: all three).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$PWD/.venv/bin
scratch=_build/smoke

style() {
  "$bin/ruff" check . && "$bin/ruff" format --check .
}

tests() {
  # One thread per worker: two workers with two threads each are slower than either alone.
  OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --durations=10
}

# Every notebook from nothing: small phantoms, no earlier runs, parameters injected as papermill does it for a reader.
notebooks() {
  local kind notebook
  rm -rf $scratch && mkdir -p $scratch
  for kind in bus cxr brain; do
    "$bin/python" data_scripts/phantoms.py $kind --n 120 --size 64 --out $scratch/data/phantom_$kind || return 1
  done
  for kind in torso_ct torso_mr torso_pet prognosis lesions_ct lesions_mr lesions_varied; do
    "$bin/python" data_scripts/phantoms.py $kind --n 60 --out $scratch/data/phantom_$kind || return 1
  done
  for notebook in notebooks/*.ipynb; do
    "$bin/papermill" --prepare-only --log-level WARNING "$notebook" "$scratch/$(basename "$notebook")" \
      -p profile smoke -p data "$PWD/$scratch/data" -p runs "$PWD/$scratch/runs" || return 1
  done
  # Two at a time, the longest first; a notebook's words appear when it ends, so that two do not mix theirs.
  export -f run_notebook
  export bin
  ls -S $scratch/*.ipynb | OMP_NUM_THREADS=1 xargs -P 2 -I {} bash -c 'run_notebook {}'
}

run_notebook() {
  local status=0 start=$SECONDS
  "$bin/python" -m pytest --nbval-lax --nbval-cell-timeout 600 --exitfirst "$1" >"$1.log" 2>&1 || status=1
  cat "$1.log"
  printf '%s: %d s\n' "$(basename "$1")" $((SECONDS - start))
  return $status
}

stages=(style tests notebooks)
[ $# = 0 ] || stages=("$@")
for stage in "${stages[@]}"; do
  case $stage in
    style | tests | notebooks) ;;
    *)
      echo "STAGES names '$stage', and the stages are style, tests and notebooks." >&2
      exit 2
      ;;
  esac
done

lines=()
failed=0
passed=0
for stage in "${stages[@]}"; do
  printf '\n== %s\n' "$stage"
  start=$SECONDS
  if "$stage"; then
    verdict=passed
    passed=$((passed + 1))
  else
    verdict=FAILED
    failed=$((failed + 1))
  fi
  lines+=("$(printf '%-10s %-7s %4d s' "$stage" $verdict $((SECONDS - start)))")
done

printf '\n== make test, %d s in all\n' "$SECONDS"
printf '%s\n' "${lines[@]}"
printf 'stages: %d passed, %d failed\n' $passed $failed
[ $failed = 0 ]
