# Makes a virtual environment, if it is missing or older than pyproject.toml. Source it, then call:
#   make_venv [EXTRA]     EXTRA: an optional dependency group of pyproject.toml
# Its folder is in $venv then: .venv, or for another TorchTitan than the newest .venv-$TITAN; the
# version of TorchTitan in $titan. TITAN=main takes the checkout in $TORCHTITAN_FOLDER, with the
# PyTorch that it was tried with, a CUDA build of several GB.
# The interpreter is $PYTHON, or python3; the version of TorchTitan $TITAN, or the newest.

make_venv() {
  local extra="${1:-}" newest=0.3.0 python="${PYTHON:-python3}" stamp wanted
  # TorchTitan 0.3 wants Python 3.11.
  if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then newest=0.2.2; fi
  titan="${TITAN:-$newest}"
  venv=".venv"
  if [ "$titan" != "$newest" ]; then venv=".venv-$titan"; fi
  stamp="$venv/made-from${extra:+-$extra}"
  wanted="$(sha256sum pyproject.toml make_venv.sh)"
  if "$venv/bin/python" -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python 3.10 or newer is needed, found: $("$python" --version 2>&1). Set PYTHON=..." >&2
    return 1
  }
  echo "Installing into ./$venv (once; a few minutes)"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  local install=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  # torch first and pinned, or the resolver is free to choose another one for TorchTitan.
  if [ "$titan" = main ]; then
    "${install[@]}" "torch==2.14.1" hypothesis pytest pytest-xdist setuptools tomli
    "${install[@]}" -e "${TORCHTITAN_FOLDER:?names a checkout of TorchTitan}" -e .
  else
    "${install[@]}" "torch==2.13.0"
    "${install[@]}" "torchtitan==$titan"
    "${install[@]}" -e ".[torchtitan${extra:+,$extra}]"
  fi
  echo "$wanted" > "$stamp"
}
