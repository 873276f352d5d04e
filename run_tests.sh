#!/usr/bin/env bash
# All checks: style, types, the site, tests. Sets everything up on the first call.
# Arguments go to pytest: ./run_tests.sh tests/shampoo_torchtitan -k plan
# TITAN=0.2.2 ./run_tests.sh: with that TorchTitan. TITAN=0.4: what a stand-in for it can show.
# TITAN=main TORCHTITAN_FOLDER=...: what a checkout of August 2026 can. Without any, what depends on
# TorchTitan is run with all but the last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

source ./make_venv.sh

everything=()  # two files at a time, in the order of tests/conftest.py
if [ $# -eq 0 ]; then everything=(-n 2 --dist loadfile --no-loadscope-reorder); fi
titans=tests/shampoo_torchtitan

stand_in() {
  echo "With a stand-in for the optimizers of TorchTitan 0.4"
  local tests=("$@") path="$PWD/$venv/bin:$PATH" folder="$PWD/$venv/titan-0.4"
  if [ $# -eq 0 ]; then tests=($titans/test_{groups_04,configs,job_config,doorways}.py); fi
  PATH="$path" python -m tests.titan_04 "$folder"
  PATH="$path" PYTHONPATH="$folder" pytest -q "${everything[@]}" "${tests[@]}"
}

if [ "${TITAN:-}" = main ]; then
  make_venv
  if [ $# -eq 0 ]; then set -- $titans/test_{main,configs,job_config,groups_04}.py; fi
  PATH="$PWD/$venv/bin:$PATH" exec pytest -q "$@"
elif [ "${TITAN:-}" = 0.4 ]; then
  unset TITAN
  make_venv test,doorways,docs
  stand_in "$@"
  exit
fi

# The frameworks of the examples and the site once.
if [ -z "${TITAN:-}" ]; then make_venv test,doorways,docs; else make_venv test; fi

(
  export PATH="$PWD/$venv/bin:$PATH"
  ruff check -q .
  ruff format -q --check .
  mypy --strict shampoo_fsdp tests/typed_use.py
  imports="$(lint-imports --no-cache)" || { echo "$imports"; exit 1; }
  if [ -z "${TITAN:-}" ]; then NO_MKDOCS_2_WARNING=1 mkdocs build -q --strict; fi
  pytest -q "${everything[@]}" "$@"
)
if [ -z "${TITAN:-}" ] && [ $# -eq 0 ] && [ "$titan" != 0.2.2 ]; then
  stand_in
  echo "The same with TorchTitan 0.2.2, as far as it depends on it"
  TITAN=0.2.2
  make_venv test
  PATH="$PWD/$venv/bin:$PATH" pytest -q "${everything[@]}" $titans tests/studies/test_job.py
fi
