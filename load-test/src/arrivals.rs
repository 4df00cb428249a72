//! How buyers arrive, and the loops that drive them.
//!
//! **Closed loop**: each of N clients sends its next request when it has an answer. It finds the highest rate. It says
//! little about waiting, because a slow system gets fewer requests.
//!
//! **Open loop**: buyers arrive by the clock, whether or not earlier ones have been served. Each latency is measured
//! from the moment when the buyer was due, so time spent waiting for a slow system counts.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};
use uuid::Uuid;

use crate::http::{Address, Connection};
use crate::measure::{Point, Recorder};

/// How many due arrivals may wait in the channel: more than arrive during one turn of the loop.
const DUE_MAX: usize = 4096;

/// One buyer at a time, with a connection to each service.
pub struct Client {
    /// The connection to the Event Service.
    pub event: Connection,
    /// The connection to the Booking Service, or to one of its replicas.
    pub booking: Connection,
}

impl Client {
    /// Makes a buyer's id that no one had before.
    #[must_use]
    pub fn new_user() -> Uuid {
        Uuid::now_v7()
    }
}

/// What each arrival does.
pub trait Operation {
    /// Does it once for the arrival that was due at `due`. Returns `false` if nothing was left to do.
    fn run(&self, client: &mut Client, due: Instant, recorder: &Recorder) -> impl Future<Output = bool>;
}

/// How buyers arrive.
#[derive(Debug, Clone, Copy)]
pub enum Arrivals {
    /// Each client sends its next request when it has an answer.
    Closed {
        /// The number of clients.
        clients: usize,
    },
    /// Buyers arrive by the clock.
    Open {
        /// How many arrive per second.
        rate: f64,
        /// The most arrivals in flight. Further ones are counted as not sent.
        in_flight_max: usize,
    },
}

/// When an arrival is due, counted from the first one, which has the number 0.
fn due_after(rate: f64, arrival: u64) -> Duration {
    Duration::from_secs_f64(arrival as f64 / rate)
}

/// The idle clients with their connections. The client that returned last is used first.
pub struct ClientPool {
    event: Address,
    bookings: Vec<Address>,
    idle: RefCell<Vec<Client>>,
    made: Cell<usize>,
}

impl ClientPool {
    /// Makes a pool without clients.
    #[must_use]
    pub fn new(event: &Address, bookings: &[Address]) -> Self {
        Self { event: event.clone(), bookings: bookings.to_vec(), idle: RefCell::default(), made: Cell::new(0) }
    }

    /// Makes one more client. Clients are spread over the replicas of the Booking Service in turn.
    fn new_client(&self) -> Client {
        let index = self.made.replace(self.made.get() + 1);
        let booking = &self.bookings[index % self.bookings.len()];
        Client { event: Connection::to(&self.event), booking: Connection::to(booking) }
    }

    fn take(&self) -> Client {
        self.idle.borrow_mut().pop().unwrap_or_else(|| self.new_client())
    }

    /// Makes sure that this many idle clients are there and connected.
    ///
    /// # Errors
    /// If a service does not answer.
    pub async fn connect(&self, clients: usize) -> anyhow::Result<()> {
        let mut ready: Vec<Client> = (0..clients).map(|_| self.take()).collect();
        for client in &mut ready {
            client.event.open().await?;
            client.booking.open().await?;
        }
        self.idle.borrow_mut().append(&mut ready);
        Ok(())
    }
}

/// The result of [`drive`].
#[derive(Debug, Clone, Copy)]
pub struct Drive {
    /// Seconds from the first arrival to the last answer.
    pub seconds: f64,
    /// Arrivals that were due and not sent, because too many were in flight.
    pub not_sent: u64,
    /// Whether nothing was left to do before the time was over.
    pub used_up: bool,
}

/// Runs `operation` for `time`, or until `stop` is set or nothing is left to do. `progress` gets each second's numbers
/// and the operations in flight.
pub async fn drive<O: Operation + 'static>(
    pool: &ClientPool,
    arrivals: Arrivals,
    time: Duration,
    operation: &Rc<O>,
    recorder: &Rc<Recorder>,
    stop: &Rc<Cell<bool>>,
    progress: impl Fn(&Point, usize),
) -> Drive {
    let begun = Instant::now();
    let mut driver = Driver {
        pool,
        operation,
        recorder,
        running: JoinSet::new(),
        used_up: false,
        not_sent: 0,
        deadline: Deadline { at: begun + time, stop: Rc::clone(stop) },
    };
    match arrivals {
        Arrivals::Closed { clients } => driver.closed(clients, progress).await,
        Arrivals::Open { rate, in_flight_max } => driver.open(rate, in_flight_max, begun, time, progress).await,
    }
    Drive { seconds: begun.elapsed().as_secs_f64(), not_sent: driver.not_sent, used_up: driver.used_up }
}

/// When no new operation may begin.
#[derive(Clone)]
struct Deadline {
    at: Instant,
    stop: Rc<Cell<bool>>,
}

impl Deadline {
    fn is_over(&self) -> bool {
        self.stop.get() || Instant::now() >= self.at
    }
}

struct Driver<'a, O> {
    pool: &'a ClientPool,
    operation: &'a Rc<O>,
    recorder: &'a Rc<Recorder>,
    /// The clients at work. Each task returns its client, and whether there was something to do.
    running: JoinSet<(Client, bool)>,
    used_up: bool,
    not_sent: u64,
    deadline: Deadline,
}

impl<O: Operation + 'static> Driver<'_, O> {
    async fn closed(&mut self, clients: usize, progress: impl Fn(&Point, usize)) {
        for _ in 0..clients {
            let (operation, recorder) = (Rc::clone(self.operation), Rc::clone(self.recorder));
            let (mut client, deadline) = (self.pool.take(), self.deadline.clone());
            self.running.spawn_local(async move {
                while !deadline.is_over() {
                    if !operation.run(&mut client, Instant::now(), &recorder).await {
                        return (client, false);
                    }
                }
                (client, true)
            });
        }
        let mut seconds = Seconds::begin();
        loop {
            tokio::select! {
                ended = self.running.join_next() => match ended {
                    Some(ended) => self.returned(ended),
                    None => break,
                },
                _ = seconds.ticks.tick() => seconds.tick(self.recorder, self.running.len(), &progress),
            }
        }
        seconds.last(self.recorder);
    }

    async fn open(
        &mut self,
        rate: f64,
        in_flight_max: usize,
        begun: Instant,
        time: Duration,
        progress: impl Fn(&Point, usize),
    ) {
        let (announce, mut due) = mpsc::channel(DUE_MAX);
        // The clock has its own thread. The runtime's timers count whole milliseconds, which is as long as a fast
        // answer takes.
        let clock = thread::spawn(move || announce_arrivals(rate, begun, time, &announce));
        let mut seconds = Seconds::begin();
        let mut open = true;
        while open || !self.running.is_empty() {
            tokio::select! {
                arrival = due.recv(), if open => match arrival {
                    Some(_) if self.used_up || self.deadline.stop.get() => open = false,
                    Some(arrival) if self.running.len() < in_flight_max => self.send(arrival),
                    Some(_) => self.not_sent += 1,
                    None => open = false,
                },
                Some(ended) = self.running.join_next() => self.returned(ended),
                _ = seconds.ticks.tick() => seconds.tick(self.recorder, self.running.len(), &progress),
            }
        }
        seconds.last(self.recorder);
        // Closes the channel, so that the clock stops at its next arrival.
        drop(due);
        self.not_sent += clock.join().unwrap_or_default();
    }

    fn send(&mut self, due: Instant) {
        let (operation, recorder) = (Rc::clone(self.operation), Rc::clone(self.recorder));
        let mut client = self.pool.take();
        self.running.spawn_local(async move {
            let done = operation.run(&mut client, due, &recorder).await;
            (client, done)
        });
    }

    fn returned(&mut self, ended: Result<(Client, bool), tokio::task::JoinError>) {
        // If a client panicked, that is a bug in this program, and the panic has been printed.
        let Ok((client, done)) = ended else { return };
        self.used_up |= !done;
        self.pool.idle.borrow_mut().push(client);
    }
}

/// Announces each arrival when it is due. Returns how many were not announced because the receiver was too slow.
fn announce_arrivals(rate: f64, begun: Instant, time: Duration, announce: &mpsc::Sender<Instant>) -> u64 {
    let mut missed = 0;
    for arrival in 0.. {
        let after = due_after(rate, arrival);
        if after >= time {
            break;
        }
        let due = begun + after;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        match announce.try_send(due) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => missed += 1,
            Err(mpsc::error::TrySendError::Closed(_)) => break,
        }
    }
    missed
}

/// Splits a run into seconds.
struct Seconds {
    ticks: tokio::time::Interval,
    last: Instant,
}

impl Seconds {
    fn begin() -> Self {
        let second = Duration::from_secs(1);
        let mut ticks = interval_at(tokio::time::Instant::now() + second, second);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ticks, last: Instant::now() }
    }

    fn tick(&mut self, recorder: &Recorder, in_flight: usize, progress: &impl Fn(&Point, usize)) {
        let length = self.last.elapsed();
        self.last = Instant::now();
        progress(&recorder.tick(length), in_flight);
    }

    /// The remainder is a point of the series, too, unless it is too short for a rate.
    fn last(&self, recorder: &Recorder) {
        let length = self.last.elapsed();
        if length >= Duration::from_millis(250) {
            recorder.tick(length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Outcome;
    use crate::measure::Step;

    const STEP: Step = Step { name: "wait", good: &[200], refused: &[] };

    /// An operation of this length that can run this many times.
    struct Wait {
        takes: Duration,
        left: Cell<u64>,
    }

    impl Operation for Wait {
        async fn run(&self, _: &mut Client, due: Instant, recorder: &Recorder) -> bool {
            if self.left.get() == 0 {
                return false;
            }
            self.left.set(self.left.get() - 1);
            tokio::time::sleep(self.takes).await;
            recorder.count(STEP, Outcome::Status(200), due);
            true
        }
    }

    async fn wait(arrivals: Arrivals, time: u64, takes: u64, left: u64) -> (Drive, crate::measure::Counted) {
        let address = "http://127.0.0.1:1".parse().unwrap();
        let pool = ClientPool::new(&address, std::slice::from_ref(&address));
        let operation = Rc::new(Wait { takes: Duration::from_millis(takes), left: Cell::new(left) });
        let recorder = Rc::new(Recorder::of(STEP));
        let (time, stop) = (Duration::from_millis(time), Rc::new(Cell::new(false)));
        let local = tokio::task::LocalSet::new();
        let driven = local.run_until(drive(&pool, arrivals, time, &operation, &recorder, &stop, |_, _| {})).await;
        (driven, recorder.finish(driven.seconds))
    }

    #[test]
    fn arrivals_are_evenly_spaced_and_do_not_drift() {
        assert_eq!(due_after(500.0, 0), Duration::ZERO);
        assert_eq!(due_after(500.0, 1), Duration::from_millis(2));
        assert_eq!(due_after(3.0, 3_000_000), Duration::from_secs(1_000_000));
    }

    #[tokio::test]
    async fn in_an_open_loop_all_arrive_in_time_and_waiting_counts_as_latency() {
        let arrivals = Arrivals::Open { rate: 1000.0, in_flight_max: 1000 };
        let (driven, counted) = wait(arrivals, 200, 50, 1000).await;
        assert_eq!((counted.operations, driven.not_sent), (200, 0));
        assert!(counted.steps[0].latency.p50_ms >= 50.0, "{:?}", counted.steps[0].latency);
    }

    #[tokio::test]
    async fn arrivals_beyond_the_limit_are_not_sent_and_are_counted() {
        let (driven, counted) = wait(Arrivals::Open { rate: 1000.0, in_flight_max: 2 }, 200, 1000, 1000).await;
        // On a busy machine, the first two may be done before the last are due.
        assert!(counted.operations + driven.not_sent == 200 && (2..10).contains(&counted.operations), "{driven:?}");
    }

    #[tokio::test]
    async fn a_closed_loop_ends_when_nothing_is_left_to_do() {
        let (driven, counted) = wait(Arrivals::Closed { clients: 4 }, 60_000, 1, 10).await;
        assert_eq!((counted.operations, driven.used_up), (10, true));
        assert!(driven.seconds < 5.0);
    }

    #[tokio::test]
    async fn a_closed_loop_ends_when_its_time_is_over() {
        let (driven, counted) = wait(Arrivals::Closed { clients: 2 }, 100, 10, 1_000_000).await;
        assert!(!driven.used_up && (2..=24).contains(&counted.operations), "{driven:?} {}", counted.operations);
    }
}
