# Sourced by quickstart and test: creates the environment in .venv from constraints.txt, if it is not up to date.
# Changes only the working directory and PATH. Needs Python 3.11 or newer with venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

setup_environment() {
    local python=${PYTHON:-python3} stamp=.venv/aurora-stamp wanted
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is missing or older than 3.11; set PYTHON to a newer one" >&2
        exit 2
    fi
    wanted=$(cat constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing the environment into .venv (a few minutes the first time)"
        # An environment that was moved or is incomplete is created again; packages come from pip's cache.
        .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv || exit 1
        .venv/bin/python -m pip install --disable-pip-version-check --quiet \
            --constraint constraints.txt torch --editable '.[dev]' || exit 1
        echo "$wanted" >"$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}
