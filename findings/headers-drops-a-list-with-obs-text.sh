#!/usr/bin/env bash
# Guess:  An If-None-Match or If-Match list with several entity tags matches if one of its tags is the current one.
# So:     headers 0.4.2 splits the list only if all of it is visible ASCII. One tag with an obs-text byte (0x80 to 0xFF),
#         which RFC 9110 allows in a tag, makes the others match nothing: a GET gets 200 instead of 304, an edit 412.
#         A list that holds the same tag alone is parsed into an ETag without an error.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "tags"
version = "0.1.0"
edition = "2021"

[dependencies]
headers = "=0.4.2"
http = "1"
TOML
cat >src/main.rs <<'RUST'
use headers::{ETag, HeaderMapExt, IfMatch, IfNoneMatch};
use http::{HeaderMap, HeaderValue, header};

fn main() {
    let current: ETag = "\"7\"".parse().unwrap();
    let with = |name: http::HeaderName, value: &[u8]| {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_bytes(value).unwrap());
        headers
    };
    for (text, value) in [("ascii", &b"\"6\", \"7\""[..]), ("obs-text", &b"\"\xe9\", \"7\""[..])] {
        let edit: IfMatch = with(header::IF_MATCH, value).typed_get().unwrap();
        let read: IfNoneMatch = with(header::IF_NONE_MATCH, value).typed_get().unwrap();
        let is_known = !read.precondition_passes(&current);
        println!("{text}: If-Match matches {}, If-None-Match matches {is_known}", edit.precondition_passes(&current));
    }
    let alone: Option<ETag> = with(header::ETAG, b"\"\xe9\"").typed_get();
    println!("alone: an ETag {}", alone.is_some());
}
RUST

cargo --version
printed=$(cargo run --quiet)
printf 'headers 0.4.2\n%s\n' "$printed"
expected='ascii: If-Match matches true, If-None-Match matches true
obs-text: If-Match matches false, If-None-Match matches false
alone: an ETag true'
[[ $printed == "$expected" ]] || { echo 'The behaviour has changed.'; exit 1; }
