#!/usr/bin/env bash
# What make calls before it can do anything else:
#   setup.sh environment   fills .venv with the exact pins of requirements.lock, and this project
#   setup.sh browser       finds a Chromium for the page tests, or installs one
#   setup.sh lock          writes requirements.lock anew from pyproject.toml, keeping the pins that still fit
# Honoured: PYTHON=<interpreter>, UV=<path of uv>, UV=no (plain pip), CHROMIUM=<browser>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
unfinished=.venv.unfinished
uv_pin=uv==0.13.9
started=$SECONDS

say() { printf '[setup] %s\n' "$*"; }
stop() {
  printf '[setup] %s\n' "$*" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

suits() {
  case "$(version_of "$1")" in
    3.11.* | 3.12.*) ;;
    *) return 1 ;;
  esac
}

# A name on PATH is not yet an interpreter (pyenv and others leave shims that only complain), so each is run.
choose_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" ||
      stop "PYTHON=$PYTHON $(found=$(version_of "$PYTHON") && echo "is Python $found" || echo "does not run"), and Python 3.11 or 3.12 is needed: name one, as in 'make setup PYTHON=python3.11'."
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3 python; do
    if suits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  stop "No Python 3.11 or 3.12 was found on PATH: install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name it, as in 'make setup PYTHON=/path/to/python3.11'."
}

# Runs a command as root where that needs no password; fails where it does.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo -n "$@"
  else
    return 1
  fi
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  as_root apt-get update -qq </dev/null &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null
}

path_uv() {
  [ "${UV:-}" != no ] && command -v "${UV:-uv}" 2>/dev/null
}

create_venv() {
  local python=$1 uv
  "$python" -m venv --clear "$venv" >/dev/null 2>&1 && return
  if uv=$(path_uv) && "$uv" venv --quiet --clear --seed --python "$python" "$venv"; then
    return
  fi
  say "$python has no working venv module: installing Debian's python3-venv."
  apt_install python3-venv && "$python" -m venv --clear "$venv" ||
    stop "$python could not create $venv: install its venv module (Debian and Ubuntu: apt-get install python3-venv) and run make again."
}

# Prints the uv to use; fails where only pip is to be had.
obtain_uv() {
  path_uv && return
  [ "${UV:-}" = no ] && return 1
  [ -x $venv/bin/uv ] || $venv/bin/python -m pip install --quiet --disable-pip-version-check $uv_pin >/dev/null 2>&1 || return 1
  echo $venv/bin/uv
}

install_with_uv() {
  local quiet=--quiet
  [ -t 2 ] && quiet=
  "$1" pip install $quiet --compile-bytecode --python $venv/bin/python -r requirements.lock &&
    "$1" pip install --quiet --python $venv/bin/python --no-deps --no-build-isolation -e .
}

install_with_pip() {
  $venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock |
    { grep --line-buffered -E '^(Collecting|ERROR)' || true; } &&
    $venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
}

environment() {
  local python wanted has uv
  python=$(choose_python)
  wanted=$(version_of "$python")
  has=$(version_of $venv/bin/python || true)
  if [ -e $unfinished ]; then
    say "The last set-up was interrupted: starting $venv over (what was downloaded is kept)."
    has=
  elif [ -n "$has" ] && [ -z "${PYTHON:-}" ] && suits $venv/bin/python; then
    wanted=$has
  fi
  touch $unfinished
  rm -f $venv/.ready
  if [ "${has%.*}" != "${wanted%.*}" ]; then
    say "Creating $venv with Python $wanted ($(command -v "$python"))."
    create_venv "$python"
  fi
  if uv=$(obtain_uv); then
    say "Installing the $(grep -c == requirements.lock) pins of requirements.lock into $venv with $uv: about 6 GB, most of it PyTorch."
    install_with_uv "$uv" || { say "uv did not get through: going on with pip."; uv=; }
  fi
  if [ -z "$uv" ]; then
    say "Installing the $(grep -c == requirements.lock) pins of requirements.lock into $venv with pip: about 6 GB, some minutes."
    install_with_pip || stop "The packages of requirements.lock could not be installed: read the message above, check network and free disk space, and run make again."
  fi
  echo "${PYTHON:-}" >$venv/.ready
  rm $unfinished
  say "Ready after $((SECONDS - started)) s: $venv holds Python $wanted and the book's library."
}

# Prints the first browser that starts: the one named, one on PATH, or the one that Playwright keeps.
find_browser() {
  local candidate
  for candidate in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable \
    "$($venv/bin/python -c 'from playwright.sync_api import sync_playwright as play
with play() as p: print(p.chromium.executable_path)' 2>/dev/null)"; do
    if "$candidate" --version >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

browser() {
  local found
  if ! found=$(find_browser); then
    say "Installing Chromium for the page tests."
    apt_install chromium || $venv/bin/python -m playwright install chromium >/dev/null 2>&1 || true
    found=$(find_browser) || {
      say "No Chromium could be installed, so the page tests will be skipped: install chromium or Google Chrome to run them."
      return
    }
  fi
  echo "$found" >$venv/.browser
  say "Browser for the page tests: $found."
}

lock() {
  local uv
  uv=$(obtain_uv) || stop "requirements.lock is resolved by uv, which could not be had: install uv (pip install uv) and run make lock again."
  "$uv" pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
    --custom-compile-command 'make lock' pyproject.toml -o requirements.lock
  say "Wrote requirements.lock; 'git diff requirements.lock' shows what moved."
}

case "${1:-}" in
  environment | browser | lock) "$1" ;;
  *) stop "setup.sh takes environment, browser or lock; 'make setup' is what you want." ;;
esac
