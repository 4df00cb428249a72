#!/usr/bin/env bash
# Guess:  header_read_timeout of hyper's HTTP/1 server limits the time from the first byte of a head to its last, so a
#         kept connection may be idle between two requests for as long as it likes.
# So:     the time begins when the server starts to wait for the next head. A connection on which not one byte of a
#         second request came is closed after it, without an answer. So one timer cannot give a head 10 s and an idle
#         connection 75 s. It also bounds the time before the first request.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "idle"
version = "0.1.0"
edition = "2021"

[dependencies]
http-body-util = "0.1"
hyper = { version = "=1.12.0", features = ["http1", "server"] }
hyper-util = { version = "=0.1.21", features = ["tokio"] }
tokio = { version = "1", features = ["io-util", "macros", "net", "rt-multi-thread", "time"] }
TOML
cat >src/main.rs <<'RUST'
use std::convert::Infallible;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = service_fn(|_: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hi")))) });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(Duration::from_secs(1))
                    .serve_connection(TokioIo::new(stream), answer),
            );
        }
    });

    for (name, requests) in [("before the first request", 0), ("after a request", 1)] {
        let mut client = TcpStream::connect(address).await.unwrap();
        let mut bytes = [0; 1024];
        for _ in 0..requests {
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            assert!(client.read(&mut bytes).await.unwrap() > 0);
        }
        // From here on the client sends nothing.
        let begun = Instant::now();
        let read = tokio::time::timeout(Duration::from_secs(5), client.read(&mut bytes)).await;
        let closed = matches!(read, Ok(Ok(0))) && begun.elapsed() < Duration::from_secs(3);
        println!("idle {name}: closed without an answer within 3 s: {closed}");
    }
}
RUST

cargo --version
printed=$(cargo run --quiet)
printf 'hyper 1.12.0, header_read_timeout 1 s\n%s\n' "$printed"
expected='idle before the first request: closed without an answer within 3 s: true
idle after a request: closed without an answer within 3 s: true'
[[ $printed == "$expected" ]] || { echo 'The behaviour has changed.'; exit 1; }
