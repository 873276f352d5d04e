#!/usr/bin/env bash
# All checks: style, types, the site, tests. Sets everything up on the first call.
# Arguments go to pytest: ./run_tests.sh tests/shampoo_torchtitan -k metrics
# TITAN=0.2.2 ./run_tests.sh: with that TorchTitan. Without either what depends on TorchTitan is run
# with both.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

source ./make_venv.sh
# The frameworks of the examples and the site once.
if [ -z "${TITAN:-}" ]; then make_venv test,doorways,docs; else make_venv test; fi

everything=()
if [ $# -eq 0 ]; then everything=(-n 2 --dist loadfile); fi  # two files at a time

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
  echo "The same with TorchTitan 0.2.2, as far as it depends on it"
  TITAN=0.2.2
  make_venv test
  PATH="$PWD/$venv/bin:$PATH" pytest -q "${everything[@]}" \
    tests/shampoo_torchtitan tests/studies/test_job.py
fi
