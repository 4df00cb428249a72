#!/usr/bin/env bash
# Guess:  Job::new_repeated_async(Duration::from_millis(1500), ...) of tokio-cron-scheduler runs every 1.5 s: 4 times in 6.6 s.
# So:     it runs every second. The scheduler stores a period in whole seconds and cuts off the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "periods"
version = "0.1.0"
edition = "2021"

[dependencies]
tokio = { version = "1", features = ["macros", "rt-multi-thread", "time"] }
tokio-cron-scheduler = "=0.15.1"
TOML
cat >src/main.rs <<'RUST'
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio_cron_scheduler::{Job, JobScheduler};

#[tokio::main]
async fn main() {
    let runs = Arc::new(AtomicU32::new(0));
    let scheduler = JobScheduler::new().await.unwrap();
    let counter = runs.clone();
    let job = Job::new_repeated_async(Duration::from_millis(1500), move |_, _| {
        counter.fetch_add(1, Ordering::Relaxed);
        Box::pin(async {})
    });
    scheduler.add(job.unwrap()).await.unwrap();
    scheduler.start().await.unwrap();
    tokio::time::sleep(Duration::from_millis(6600)).await;
    println!("{}", runs.load(Ordering::Relaxed));
}
RUST

cargo --version
cargo build --quiet
runs=$(./target/debug/periods)
printf 'tokio-cron-scheduler 0.15.1: a period of 1.5 s ran %s times in 6.6 s\n' "$runs"
((runs >= 5)) || { echo 'The behaviour has changed.'; exit 1; }
