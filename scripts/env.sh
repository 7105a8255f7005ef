# Sourced by the other scripts: a virtual environment for this checkout, created on first use.
#
#   prepare EXTRAS      install this project with these extras ("dev", "plots", ...) and put its python first on PATH
#   quick N M           print N; with QUICK=1 print M, for a trial of the script with a few steps of each stage
#
# PYTHON=...          Python interpreter of the environment (3.11 or newer)
# JAXRLHF_VENV=...    folder of the environment (default: .venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxrlhf needs Python 3.11 or newer; found none among: ${PYTHON:-python3 python3.12 python3.11 python}" >&2
  echo "Install one, or give its path: PYTHON=/path/to/python3.11 bash $0" >&2
  exit 1
}

quick() { if [ "${QUICK:-}" = 1 ]; then echo "$2"; else echo "$1"; fi; }

prepare() {
  local extras=$1 venv=${JAXRLHF_VENV:-.venv} stamp log
  if [ ! -x "$venv/bin/python" ]; then
    local python
    python=$(find_python)
    echo "creating $venv with $("$python" --version) ..."
    if ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      echo "could not create a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv" >&2
      exit 1
    fi
  fi
  # Install again only when pyproject.toml changes.
  stamp="$venv/.jaxrlhf-$extras-$(cksum < pyproject.toml | cut -d' ' -f1)"
  if [ ! -f "$stamp" ]; then
    echo "installing jaxrlhf[$extras] and its dependencies (about 1.2 GB, once) ..."
    log="$venv/install.log"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]" > "$log" 2>&1; then
      tail -n 20 "$log" >&2
      echo "installation failed; the full log is $log" >&2
      exit 1
    fi
    touch "$stamp"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
}
