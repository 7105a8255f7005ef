# Sourced by the other scripts: an environment of its own for this checkout, made on first use.
#
#   prepare EXTRAS      installs this project with those extras ("dev", "plots", ...) and puts its python first on PATH
#
# PYTHON=...          which interpreter to build it from (3.11 or newer)
# JAXRLHF_VENV=...    where it lives (default: .venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxrlhf needs Python 3.11 or newer; none of these is one: ${PYTHON:-python3 python3.12 python3.11 python}" >&2
  echo "Install one, or say where it is: PYTHON=/path/to/python3.11 bash $0" >&2
  exit 1
}

prepare() {
  local extras=$1 venv=${JAXRLHF_VENV:-.venv} stamp log
  if [ ! -x "$venv/bin/python" ]; then
    local python
    python=$(find_python)
    echo "making $venv with $("$python" --version) ..."
    if ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      echo "could not make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv" >&2
      exit 1
    fi
  fi
  # Installed again only when the project's description changes.
  stamp="$venv/.jaxrlhf-$extras-$(cksum < pyproject.toml | cut -d' ' -f1)"
  if [ ! -f "$stamp" ]; then
    echo "installing jaxrlhf[$extras] and what it needs (about 1.2 GB, once) ..."
    log="$venv/install.log"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]" > "$log" 2>&1; then
      tail -n 20 "$log" >&2
      echo "installation failed; the whole log is $log" >&2
      exit 1
    fi
    touch "$stamp"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
}
