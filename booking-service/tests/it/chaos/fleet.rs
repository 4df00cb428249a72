//! Two Event Services, three Booking Services, two workers and a Redis as processes, with a proxy that can fail in
//! front of everything they share. A process that dies is started again, as by any supervisor. An unexpected death is
//! recorded.

use std::fs::{self, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use booking_service::settings::Settings;
use futures::future::join_all;
use reqwest::Client;
use service_kit::amqp::Broker;
use service_kit::process::settings::Secret;
use service_kit::testing::wires::ChaosProxy;
use service_kit::testing::{server, wait_until};
use sqlx::AssertSqlSafe;
use tokio::process::{Child, Command};

use crate::processes::{self, free_port};
use crate::support::System;

/// Longer than the 20 s in which a process must have finished its work after SIGTERM.
const STOP_TIME_MAX: Duration = Duration::from_secs(25);
const KILLED: i32 = 9;
const ABORTED: i32 = 6;

/// The fleet's role in PostgreSQL. A fault can end the connections of this role without those of the test.
pub(super) const ROLE: &str = "chaos_fleet";

type MakeCommand = Box<dyn Fn() -> Command + Send + Sync>;

/// A process that the fleet keeps running.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) base: String,
    command: MakeCommand,
    log: PathBuf,
    /// Whether it has answered since its last start. Before that, it may exit because its database does not answer.
    served: AtomicBool,
    run: Mutex<Run>,
}

#[derive(Default)]
struct Run {
    child: Option<Child>,
    /// When it is started again.
    back_at: Option<Instant>,
    down_for: Duration,
    /// The crash point at which the next run ends.
    next_crash: Option<String>,
    doomed: bool,
    killed: bool,
    told_to_stop: Option<Instant>,
}

impl Member {
    fn new(folder: &Path, name: &str, port: u16, command: MakeCommand) -> Self {
        Self {
            name: name.to_owned(),
            base: format!("http://127.0.0.1:{port}"),
            command,
            log: folder.join(format!("{name}.log")),
            served: AtomicBool::new(false),
            run: Mutex::default(),
        }
    }

    /// Kills it with SIGKILL. It starts again after `down_for`, and that run ends at the crash point, if one is named.
    pub(super) fn kill(&self, down_for: Duration, next_crash: Option<String>) {
        let mut run = self.run.lock().unwrap();
        (run.killed, run.down_for, run.next_crash) = (true, down_for, next_crash);
        if let Some(child) = &mut run.child {
            let _ = child.start_kill();
        }
    }

    /// Stops it with SIGTERM. It starts again at once.
    pub(super) fn stop(&self) {
        self.run.lock().unwrap().told_to_stop = Some(Instant::now());
        self.signal("TERM");
    }

    /// Sends it a signal, if it is running.
    pub(super) fn signal(&self, name: &str) {
        let id = self.run.lock().unwrap().child.as_ref().and_then(Child::id);
        if let Some(id) = id {
            let mut kill = std::process::Command::new("kill");
            let _ = kill.args([format!("-{name}"), id.to_string()]).stderr(Stdio::null()).status();
        }
    }

    fn start(&self, run: &mut Run) {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let mut command = (self.command)();
        command.stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
        let crash = run.next_crash.take();
        if let Some(place) = &crash {
            command.env("CRASH_AT", place);
        }
        self.served.store(false, Ordering::Relaxed);
        *run = Run { child: Some(command.spawn().unwrap()), doomed: crash.is_some(), ..Run::default() };
    }

    /// Starts it again if it is down and its time has come. Returns what should not have happened.
    fn supervise(&self) -> Option<String> {
        let mut run = self.run.lock().unwrap();
        if run.back_at.is_some_and(|time| time <= Instant::now()) || (run.child.is_none() && run.back_at.is_none()) {
            self.start(&mut run);
            return None;
        }
        let child = run.child.as_mut()?;
        if let Some(status) = child.try_wait().unwrap() {
            let complaint = self.complaint(&run, status);
            run.child = None;
            run.back_at = Some(Instant::now() + run.down_for);
            return complaint;
        }
        if run.told_to_stop.is_some_and(|told| told.elapsed() > STOP_TIME_MAX) {
            (run.told_to_stop, run.killed) = (None, true);
            let _ = run.child.as_mut()?.start_kill();
            return Some(format!("{} did not stop within {STOP_TIME_MAX:?}", self.name));
        }
        None
    }

    fn complaint(&self, run: &Run, status: ExitStatus) -> Option<String> {
        let expected = match status.signal() {
            Some(KILLED) => run.killed,
            Some(ABORTED) => run.doomed,
            Some(_) => false,
            None if run.told_to_stop.is_some() => status.success(),
            None => !self.served.load(Ordering::Relaxed) && !status.success(),
        };
        (!expected).then(|| format!("{} ended by {status}", self.name))
    }

    async fn serves(&self, http: &Client) -> bool {
        let asked = http.get(format!("{}/health/live", self.base)).send().await;
        asked.is_ok_and(|response| response.status() == 200)
    }

    /// How many lines of its log contain these words.
    fn lines_with(&self, words: &str) -> usize {
        fs::read_to_string(&self.log).unwrap_or_default().lines().filter(|line| line.contains(words)).count()
    }
}

/// All processes of a chaos run, and the proxies between them.
pub(super) struct Fleet {
    /// Event Services 0 and 1, Booking Services 2 to 4, workers 5 and 6, Redis 7.
    pub(super) members: Vec<Member>,
    pub(super) wires: Vec<(&'static str, ChaosProxy)>,
    pub(super) redis_url: String,
    /// What processes did that they should not do.
    pub(super) complaints: Mutex<Vec<String>>,
    http: Client,
}

pub(super) const BOOKINGS: std::ops::Range<usize> = 2..5;
pub(super) const REDIS: usize = 7;

impl Fleet {
    /// Makes a fleet on the databases, exchange and queue of `system`. That system's own consumer and relay are cut off
    /// from the broker, so that the fleet does all of the work.
    pub(super) async fn prepare(system: &System, folder: &Path) -> Self {
        system.to_broker.cut();
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).unwrap();

        let make = format!("create role {ROLE} superuser login password '{ROLE}'");
        // An earlier run may have made it.
        let _ = sqlx::query(AssertSqlSafe(make)).execute(&system.app.db).await;

        let mut ports = Vec::new();
        for _ in 0..=REDIS {
            ports.push(free_port().await);
        }
        let redis_url = format!("redis://127.0.0.1:{}", ports[REDIS]);
        let (to_redis, redis_through) = ChaosProxy::in_front_of(&redis_url).await;
        let (booking_broker, booking_broker_url) = ChaosProxy::in_front_of(&server("TEST_RABBITMQ_URL")).await;
        let (event_broker, event_broker_url) = ChaosProxy::in_front_of(&server("TEST_RABBITMQ_URL")).await;
        let (booking_db, booking_db_url) = ChaosProxy::in_front_of(&as_role(&system.settings.database_url)).await;
        let (event_db, event_db_url) = ChaosProxy::in_front_of(&as_role(&system.event_database_url)).await;
        let event_services = ports[..2].iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let to_event_service = ChaosProxy::to_any(event_services).await;

        let with_broker = |url: String| Broker { url: Secret::from(url.as_str()), ..system.settings.broker.clone() };
        let booking = Settings {
            database_url: Secret::from(booking_db_url.as_str()),
            redis_url: Secret::from(redis_through.as_str()),
            event_service_url: to_event_service.url(),
            broker: with_broker(booking_broker_url),
            ..system.settings.clone()
        };
        let event = Settings { broker: with_broker(event_broker_url), ..system.settings.clone() };

        Self {
            members: members(folder, &ports, &booking, &event, &event_db_url),
            wires: vec![
                ("the Event Service", to_event_service),
                ("Redis", to_redis),
                ("the broker, from Booking", booking_broker),
                ("the broker, from Event", event_broker),
                ("the booking database", booking_db),
                ("the event database", event_db),
            ],
            redis_url,
            complaints: Mutex::default(),
            http: Client::builder().timeout(Duration::from_secs(2)).build().unwrap(),
        }
    }

    /// Starts every process, and starts it again whenever it is down. It never returns.
    pub(super) async fn keep_running(&self) {
        let supervise_all = async {
            loop {
                let complaints = self.members.iter().filter_map(|member| member.supervise());
                self.complaints.lock().unwrap().extend(complaints);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let watch_health = self.members[..REDIS].iter().map(async |member| {
            loop {
                if member.serves(&self.http).await {
                    member.served.store(true, Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
        tokio::join!(supervise_all, join_all(watch_health));
    }

    /// Waits until every process runs and can reach all that it needs.
    pub(super) async fn wait_until_healthy(&self) {
        for member in &self.members[..REDIS] {
            wait_until(&format!("{} is healthy", member.name), Duration::from_secs(60), async || {
                let asked = self.http.get(format!("{}/health", member.base)).send().await;
                let Ok(response) = asked else { return false };
                response.json::<serde_json::Value>().await.is_ok_and(|health| health["status"] == "healthy")
            })
            .await;
        }
    }

    /// Ends every fault that is still active.
    pub(super) fn heal(&self) {
        for (_, wire) in &self.wires {
            wire.heal();
        }
        for member in &self.members {
            member.signal("CONT");
        }
    }

    /// How many lines with these words all processes have logged.
    pub(super) fn lines_with(&self, words: &str) -> usize {
        self.members.iter().map(|member| member.lines_with(words)).sum()
    }
}

/// The processes in the order of [`Fleet::members`], each on its port.
fn members(folder: &Path, ports: &[u16], booking: &Settings, event: &Settings, event_db_url: &str) -> Vec<Member> {
    let roles = [
        ("event-1", "event"),
        ("event-2", "event"),
        ("booking-1", "serve"),
        ("booking-2", "serve"),
        ("booking-3", "serve"),
        ("worker-1", "worker"),
        ("worker-2", "worker"),
        ("redis", "redis"),
    ];
    let member = |((name, role), &port): ((&str, &'static str), &u16)| {
        let command: MakeCommand = match role {
            "event" => {
                let (settings, url) = (event.clone(), event_db_url.to_owned());
                Box::new(move || with_info_logs(processes::event(&settings, &url, port)))
            }
            "redis" => Box::new(move || redis_server(port)),
            subcommand => {
                let settings = booking.clone();
                Box::new(move || with_info_logs(processes::booking(&settings, subcommand, port)))
            }
        };
        Member::new(folder, name, port, command)
    };
    roles.into_iter().zip(ports).map(member).collect()
}

/// The database's URL for [`ROLE`].
fn as_role(database_url: &Secret) -> String {
    let (_, address) = database_url.reveal().split_once('@').unwrap();
    format!("postgres://{ROLE}:{ROLE}@{address}")
}

fn with_info_logs(mut command: Command) -> Command {
    command.env("LOG_LEVEL", "info,sqlx=warn");
    command
}

/// As the deployments set it: no eviction, and nothing on disk, because locks need no persistence.
fn redis_server(port: u16) -> Command {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    command.args(["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]);
    command
}
