#!/usr/bin/env bash
# Runs the official OpenAI Python client against the built server, on a free port.
#
#   tests/clients/run.sh [BUNDLE]     a bundle; without it the small one of the tests
#
# SHOAL is the server's binary (default: target/debug/shoal, which is built if it is missing); VENV a
# folder for the Python packages, kept between runs. Where python3 or the package is not to be had, it
# says so and ends well.
set -euo pipefail
cd "$(dirname "$0")/../.."

bundle=${1:-tests/goldens/gpt2-tiny}
venv=${VENV:-target/clients-venv}

skip() {
    echo "tests/clients/run.sh skipped: $1"
    exit 0
}

command -v python3 >/dev/null || skip "it needs python3"
if ! "$venv/bin/python" -c 'import openai' 2>/dev/null; then
    python3 -m venv "$venv" || skip "python3 cannot make a virtual environment"
    "$venv/bin/pip" install --quiet 'openai>=1' || skip "the package openai is not to be had"
fi

shoal=${SHOAL:-target/debug/shoal}
[ -x "$shoal" ] || cargo build --locked

log=$(mktemp)
"$shoal" serve "$bundle" --port 0 >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT

# The start-up line says where it listens, once the model is ready.
for _ in $(seq 600); do
    url=$(grep -o 'http://[0-9.:]*' "$log" | head -n 1 || true)
    [ -z "$url" ] || break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
if [ -z "$url" ]; then
    cat "$log"
    echo "the server did not start"
    exit 1
fi

"$venv/bin/python" tests/clients/openai_client.py "$url"

kill "$server"
wait "$server" || { cat "$log"; echo "the server did not end well"; exit 1; }
