#!/usr/bin/env bash
# ./run.sh demo                 install, run the embedded demo, say where the report is
# ./run.sh check [options]      install, say what a run would do and all that is wrong with config and data
# ./run.sh test [pytest args]   install with the test tools, check style, run the tests
# ./run.sh <anything else>      install, then: snakemake <anything else>
#
# PYTHON chooses the interpreter (3.11 or newer), CORES how many cores the demo may use (default: all).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run.sh: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 to 3.13 found. Install one, or name it: PYTHON=/path/to/python ./run.sh demo"
}

# Installs only what changed since the last call: the stamp holds a digest of what was asked for.
install() {
    local extra=$1 stamp=".venv/.installed-$1" wanted
    if [ ! -x .venv/bin/python ]; then
        local python
        python=$(find_python)
        echo "Making .venv with $("$python" --version)"
        rm -rf .venv
        "$python" -m venv .venv || die "could not make .venv (Debian and Ubuntu: apt install python3-venv)"
    fi
    wanted=$(cat pyproject.toml constraints.txt | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing packages into .venv (about 2 GB, a few minutes the first time)"
        # The library itself is read from workflow/lib, so only its dependencies are installed.
        .venv/bin/python - "$extra" >.venv/requirements.txt <<'PY'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + extras["pipeline"]
if sys.argv[1] == "test":
    wanted += [line for line in extras["test"] if not line.startswith("biojepa")]
print("\n".join(wanted))
PY
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -r .venv/requirements.txt -c constraints.txt || die "the installation failed; see the message above"
        echo "$wanted" >"$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    export PYTHONNOUSERSITE=1 # packages of the user's own Python would shadow the pinned ones
}

case "${1:-}" in
"" | -h | --help | help)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    ;;
demo)
    shift
    install pipeline
    snakemake --cores "${CORES:-all}" --configfile config/config.yaml "$@"
    for report in results/demo/*/report.html; do
        [ -f "$report" ] && echo "Report: $PWD/$report"
    done
    ;;
check)
    shift
    install pipeline
    PYTHONPATH="$PWD/workflow/lib" exec python -m biojepa.check "$@"
    ;;
test)
    shift
    install test
    ruff check .
    ruff format --check .
    snakefmt --check Snakefile workflow
    mypy
    snakemake --lint
    # Files side by side, one thread each.
    OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile "$@"
    ;;
*)
    install pipeline
    exec snakemake "$@"
    ;;
esac
