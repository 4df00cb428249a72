#!/usr/bin/env bash
# Guess:  of sqlx's macros only query! and its relatives need a database driver while they compile, because they ask the
#         database. So the feature `derive` (#[derive(FromRow)]) without `macros` compiles the driver only for the program.
# So:     `derive` compiles sqlx-postgres, sqlx-core and the TLS stack for the macro crate, too. sqlx hands its features
#         `postgres` and `tls-...` to sqlx-macros whenever that crate is there, also with default-features = false.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
echo 'fn main() {}' >src/main.rs

# users FEATURES: the crates that use sqlx-postgres directly, if the program asks for these features of sqlx.
users() {
    rm -f Cargo.lock
    cat >Cargo.toml <<TOML
[package]
name = "driver"
version = "0.1.0"
edition = "2021"

[dependencies]
sqlx = { version = "=0.9.0", default-features = false, features = ["postgres", "runtime-tokio", "tls-rustls-aws-lc-rs"$1] }
TOML
    cargo tree --quiet --invert sqlx-postgres --depth 1 --prefix none --format '{p}' | sed 1d | sort | xargs
}

cargo --version
without=$(users '')
printf 'sqlx 0.9.0 without derive: sqlx-postgres is used by %s\n' "$without"
with=$(users ', "derive"')
printf 'sqlx 0.9.0 with derive:    sqlx-postgres is used by %s\n' "$with"
[[ $without != *sqlx-macros-core* && $with == *sqlx-macros-core* ]] || { echo 'The behaviour has changed.'; exit 1; }
