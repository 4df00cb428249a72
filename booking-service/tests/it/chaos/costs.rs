//! What a fault costs a buyer: the time of a reservation while a server is down or hangs, and the time until the system
//! has recovered. `COSTS_SECONDS` sets how long each phase is measured.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::Client;
use service_kit::testing::scale;
use service_kit::testing::wires::Mode;
use uuid::Uuid;

use super::fleet::{BOOKINGS, Fleet};
use super::wires;
use crate::support::{Sale, System};

const BUYERS: usize = 8;
const SEATS: u32 = 20_000;
/// Except at a fault's first moment, no reservation may cost more than this, even without optimisation. On a busy
/// machine, three times the median without a fault is allowed.
const MEDIAN_MAX: Duration = Duration::from_millis(250);
/// A booking waits for a missing server for at most three tries of one second each.
const SLOWEST_MAX: Duration = Duration::from_secs(5);
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(30);

/// The reservations of one phase.
struct Phase {
    times: Vec<Duration>,
    failed: usize,
}

impl Phase {
    fn at(&self, share: f64) -> Duration {
        self.times[((self.times.len() - 1) as f64 * share) as usize]
    }
}

/// Buyers that reserve one free seat after the other.
struct Buyers<'a> {
    system: &'a System,
    fleet: &'a Fleet,
    sale: Sale,
    next_seat: AtomicUsize,
}

impl Buyers<'_> {
    async fn reserve(&self, buyer: usize, http: &Client) -> bool {
        let seat = self.next_seat.fetch_add(1, Ordering::Relaxed);
        let base = &self.fleet.members[BOOKINGS][buyer % BOOKINGS.len()].base;
        let request = http.post(format!("{base}/api/v1/reservations")).header("x-user-id", Uuid::now_v7().to_string());
        request.json(&self.sale.order(&[seat])).send().await.is_ok_and(|response| response.status() == 201)
    }

    async fn measure(&self, time: Duration) -> Phase {
        let end = Instant::now() + time;
        let buyers = (0..BUYERS).map(async |buyer| {
            let (mut times, mut failed) = (Vec::new(), 0);
            while Instant::now() < end {
                let begun = Instant::now();
                match self.reserve(buyer, &self.system.http).await {
                    true => times.push(begun.elapsed()),
                    false => failed += 1,
                }
            }
            (times, failed)
        });
        let ended = join_all(buyers).await;
        let failed = ended.iter().map(|(_, failed)| failed).sum();
        let mut times: Vec<_> = ended.into_iter().flat_map(|(times, _)| times).collect();
        times.sort_unstable();
        assert!(times.len() > BUYERS, "only {} reservations were made", times.len());
        Phase { times, failed }
    }

    async fn phase(&self, name: &str, time: Duration, median_max: Duration) -> Phase {
        let phase = self.measure(time).await;
        let (median, p99, slowest) = (phase.at(0.5), phase.at(0.99), phase.at(1.0));
        let count = phase.times.len();
        println!(
            "{name:<28} {count:>6} made, {:>3} failed, p50 {median:>7.1?}, p99 {p99:>7.1?}, slowest {slowest:>7.1?}",
            phase.failed
        );
        assert!(median < median_max, "{name}: half of the reservations took more than {median:?}");
        assert!(slowest < SLOWEST_MAX, "{name}: a reservation took {slowest:?}");
        phase
    }

    async fn recover(&self, name: &str) {
        let begun = Instant::now();
        self.fleet.heal();
        self.fleet.wait_until_healthy().await;
        let took = begun.elapsed();
        println!("{name:<28} recovered after {took:.1?}");
        assert!(took < RECOVERY_TIME_MAX, "{name}: the recovery took {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_costs_a_moment_and_no_sale() {
    let time = Duration::from_secs(scale("COSTS_SECONDS", 1) as u64);
    let system = System::start().await;
    let sale = system.sale(SEATS).await;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("costs");
    let fleet = Fleet::prepare(&system, &folder).await;
    let buyers = Buyers { system: &system, fleet: &fleet, sale, next_seat: 0.into() };
    let run = async {
        fleet.wait_until_healthy().await;
        // The first second plans the statements and opens the connections.
        buyers.phase("the first second", Duration::from_secs(1), SLOWEST_MAX).await;
        let usual = buyers.phase("no fault", time, SLOWEST_MAX).await;
        let median_max = MEDIAN_MAX.max(usual.at(0.5) * 3);
        let faults = [
            ("Redis is down", wires::REDIS, Mode::Cut),
            ("Redis is frozen", wires::REDIS, Mode::Freeze),
            ("the broker is frozen", wires::BROKER_OF_BOOKING, Mode::Freeze),
        ];
        for (name, wire, mode) in faults {
            fleet.wires[wire].1.set(mode);
            let phase = buyers.phase(name, time, median_max).await;
            assert_eq!(phase.failed, 0, "{name}: a reservation failed");
            buyers.recover(name).await;
        }
        let dead = &fleet.members[0];
        dead.kill(time, None);
        buyers.phase("one Event Service of two dead", time, median_max).await;
        buyers.recover("one Event Service of two dead").await;
        buyers.phase("no fault again", time, median_max).await;
    };
    tokio::select! {
        () = run => {}
        () = fleet.keep_running() => unreachable!("`keep_running` never returns"),
    }
    assert!(fleet.complaints.lock().unwrap().is_empty(), "{:?}", fleet.complaints.lock().unwrap());
    system.finish().await;
}
