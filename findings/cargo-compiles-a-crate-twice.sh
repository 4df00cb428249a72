#!/usr/bin/env bash
# Guess:  Cargo compiles a crate once, also if both a program and its build script use it.
# So:     in a release build Cargo compiles it twice, because build scripts and their dependencies get opt-level 0 by
#         default. With the same profile (profile.release.build-override) and the same features Cargo compiles it once.
#         "The same" means the same lines: a default that only one of the two profiles writes out makes a difference.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "twice"
version = "0.1.0"
edition = "2021"

[dependencies]
memchr = "=2.7.4"

[build-dependencies]
memchr = "=2.7.4"
TOML
echo 'fn main() { println!("{:?}", memchr::memchr(b"b"[0], b"abc")); }' >src/main.rs
echo 'fn main() { assert_eq!(memchr::memchr(b"b"[0], b"abc"), Some(1)); }' >build.rs

# compiled TARGET-FOLDER: how often a release build compiles memchr.
compiled() {
    CARGO_TARGET_DIR=$folder/$1 cargo build --release --message-format json 2>/dev/null |
        grep -c '"reason":"compiler-artifact".*"name":"memchr"' || true
}

cargo --version
default=$(compiled default)
printf 'memchr 2.7.4, default settings: compiled %s times\n' "$default"
printf '\n[profile.release.build-override]\nopt-level = 3\n' >>Cargo.toml
equal=$(compiled equal)
printf 'memchr 2.7.4, build-override with the same opt-level: compiled %s times\n' "$equal"
echo 'codegen-units = 16' >>Cargo.toml
written=$(compiled written)
printf 'memchr 2.7.4, and with the default number of codegen units written out: compiled %s times\n' "$written"
[[ "$default $equal $written" == '2 1 2' ]] || { echo 'The behaviour has changed.'; exit 1; }
