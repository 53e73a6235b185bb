# `just` lists these; each is also a plain command.

default:
    @just --list

# All that must hold before a change lands
check:
    .ci/run

# All tests
test:
    cargo test

# Format the code
fmt:
    cargo fmt

# Serve the shipped bundle on http://127.0.0.1:8000
serve *args:
    cargo run --release -- serve {{args}}

# Make the shipped model again; `data` is the folder of the public texts
train data *args:
    cargo run --release -- train --config models/prompter/train.toml --data {{data}} --out out/prompter {{args}}

# Measure the shipped bundle's quality
eval *args:
    cargo run --release -- eval models/prompter {{args}}

# Measure a running server
bench url="http://127.0.0.1:8000" *args:
    cargo run --release -- bench {{url}} {{args}}
