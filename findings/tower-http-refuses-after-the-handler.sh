#!/usr/bin/env bash
# Guess:  A request whose Accept-Encoding excludes every coding the server has is refused before its handler runs, or is
#         answered plainly, as RFC 9110 allows.
# So:     CompressionLayer of tower-http 0.7.1 runs the handler first and then throws its answer away for a 406. A POST has
#         taken effect, and its sender reads an error. 0.6.11 answers plainly.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "codings"
version = "0.1.0"
edition = "2021"

[dependencies]
axum = { version = "=0.8.9", default-features = false }
new = { package = "tower-http", version = "=0.7.1", features = ["compression-gzip"] }
old = { package = "tower-http", version = "=0.6.11", features = ["compression-gzip"] }
tokio = { version = "1", features = ["macros", "rt"] }
tower = { version = "0.5", features = ["util"] }
TOML
cat >src/main.rs <<'RUST'
use std::sync::atomic::{AtomicU32, Ordering};

use axum::body::Body;
use axum::http::Request;
use axum::routing::post;
use axum::Router;
use tower::ServiceExt;

static MADE: AtomicU32 = AtomicU32::new(0);

async fn ask(name: &str, routes: Router, accepted: &str) {
    let before = MADE.load(Ordering::Relaxed);
    let request = Request::post("/").header("accept-encoding", accepted).body(Body::empty()).unwrap();
    let status = routes.oneshot(request).await.unwrap().status().as_u16();
    println!("{name}, {accepted}: status {status}, effects {}", MADE.load(Ordering::Relaxed) - before);
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let routes = Router::new().route("/", post(|| async { MADE.fetch_add(1, Ordering::Relaxed); "made" }));
    for accepted in ["gzip", "deflate, *;q=0"] {
        ask("0.6.11", routes.clone().layer(old::compression::CompressionLayer::new()), accepted).await;
        ask("0.7.1", routes.clone().layer(new::compression::CompressionLayer::new()), accepted).await;
    }
}
RUST

cargo --version
printed=$(cargo run --quiet)
printf '%s\n' "$printed"
expected='0.6.11, gzip: status 200, effects 1
0.7.1, gzip: status 200, effects 1
0.6.11, deflate, *;q=0: status 200, effects 1
0.7.1, deflate, *;q=0: status 406, effects 1'
[[ $printed == "$expected" ]] || { echo 'The behaviour has changed.'; exit 1; }
