#!/usr/bin/env bash
# Runs the client libraries that people have against the built server, on free ports, with keys.
#
#   tests/clients/run.sh [CLIENT...]    those clients; without a name all of them:
#       openai openai-node readme huggingface text-generation triton-http triton-grpc grpc guidellm
#       schemathesis
#
# One line a client: passed, SKIPPED and why, or FAILED with what it said; it fails if one of them
# failed. Skipped is what cannot be installed: no python3, no node, no network and nothing kept.
#
# SHOAL is the server's binary (default: target/debug/shoal, which is built if it is missing), BUNDLE
# what it serves (default: models/prompter), SCHEMATHESIS_SECONDS how long schemathesis looks for
# faults (default: 20; before a release: 600). Packages are kept in the user's cache folder, one
# virtual environment for each file in requirements/.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tests/clients
cache=${XDG_CACHE_HOME:-$HOME/.cache}/shoal-clients
shoal=${SHOAL:-target/debug/shoal}
export BUNDLE=${BUNDLE:-models/prompter}
wanted=" ${*:-all} "
work=$(mktemp -d)
log=$work/server.log
server=
passed=0 skipped=0 failed=0

finish() {
    [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

# report WHAT CLIENT DETAIL
report() {
    printf '%-8s %-16s %s\n' "$@"
}

# Starts the server and sets url, grpc, key. Its queue is short, so that too much can be asked of it.
start() {
    [ -x "$shoal" ] || cargo build --locked
    key=sk-clients-$(date +%s%N)
    printf '%s\n' "sk-somebody-else" "$key" >"$work/keys"
    "$shoal" serve "$BUNDLE" --port 0 --grpc-port 0 --api-key-file "$work/keys" \
        --max-waiting 32 --max-running 8 --max-rows 64 >"$log" 2>&1 &
    server=$!
    # The start-up line says where it listens, once the model is ready.
    for _ in $(seq 600); do
        url=$(grep -o 'http://[0-9.:]*' "$log" | head -n 1 || true)
        grpc=$(sed -n 's/.*gRPC on \([0-9.:]*\).*/\1/p' "$log")
        [ -z "$url" ] || [ -z "$grpc" ] || break
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    if [ -z "$url" ] || [ -z "$grpc" ]; then
        cat "$log"
        echo "the server did not start"
        exit 1
    fi
}

# Ends the server as an orchestrator would, and expects it to end well.
stop() {
    kill "$server"
    if ! wait "$server"; then
        tail -n 20 "$log"
        echo "the server did not end well"
        failed=$((failed + 1))
    fi
    server=
}

# venv GROUP: the folder of a virtual environment with exactly what requirements/GROUP.txt lists. It is
# complete when it holds a copy of that list; dependencies are all listed, so pip adds none.
venv() {
    local list=$here/requirements/$1.txt folder=$cache/$1
    if ! cmp -s "$list" "$folder/requirements.txt"; then
        rm -rf "$folder"
        python3 -m venv "$folder" && "$folder/bin/pip" install --quiet --no-deps -r "$list" &&
            cp "$list" "$folder/requirements.txt"
    fi
}

# node_modules for openai_client.mjs, kept in the same way. Node looks for packages beside the script.
packages() {
    local list=$here/package.json folder=$cache/node
    if ! cmp -s "$list" "$folder/package.json" || [ ! -d "$folder/node_modules" ]; then
        rm -rf "$folder"
        mkdir -p "$folder" && cp "$list" "$folder/" &&
            npm install --prefix "$folder" --ignore-scripts --no-audit --no-fund ||
            { rm -rf "$folder" && return 1; }
    fi
    cp "$here/openai_client.mjs" "$folder/"
}

# client NAME TOOL INSTALL GROUP COMMAND...: runs a command where its tool and packages are to be had.
client() {
    local name=$1 tool=$2 install=$3 group=$4 start=$SECONDS
    shift 4
    [[ $wanted == " all " || $wanted == *" $name "* ]] || return 0
    if ! command -v "$tool" >/dev/null; then
        report SKIPPED "$name" "it needs $tool"
        skipped=$((skipped + 1))
    elif ! "$install" "$group" >"$work/install" 2>&1; then
        report SKIPPED "$name" "not installed: $(grep -i -m 1 error "$work/install" || true)"
        skipped=$((skipped + 1))
    elif timeout "$limit" "$@" >"$work/said" 2>&1; then
        report passed "$name" "$(tail -n 1 "$work/said") ($((SECONDS - start)) s)"
        passed=$((passed + 1))
    else
        report FAILED "$name" ""
        cat "$work/said"
        failed=$((failed + 1))
    fi
}

# python NAME GROUP SCRIPT
python() {
    client "$1" python3 venv "$2" "$cache/$2/bin/python" -B "$here/$3" "$url" "$grpc" "$key"
}

limit=180
start
python openai openai openai_client.py
client openai-node npm packages node node "$cache/node/openai_client.mjs" "$url" "$grpc" "$key"
python readme openai readme_client.py
python huggingface huggingface huggingface_client.py
python text-generation text-generation text_generation_client.py
python triton-http triton triton_http_client.py
python triton-grpc triton triton_grpc_client.py
python grpc grpc grpc_client.py
python guidellm guidellm guidellm_client.py
limit=$((${SCHEMATHESIS_SECONDS:=20} + 180))
export SCHEMATHESIS_SECONDS
python schemathesis schemathesis schemathesis_client.py
stop

echo "clients: $passed passed, $skipped skipped, $failed failed"
[ "$failed" = 0 ]
