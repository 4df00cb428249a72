//! The Booking Service's command line.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use booking_service::audit::AuditWindow;
use booking_service::replay::ReplayRequest;
use booking_service::settings::Settings;
use booking_service::{app, audit, replay, schema};
use chrono::{DateTime, Utc};
use clap::{Parser, Subcommand};
use service_kit::auth::{JwtSettings, Role, tokens};
use service_kit::http::server;
use service_kit::http::tls::{self, Trust};
use service_kit::observe::{telemetry, traces};
use service_kit::postgres::database;
use service_kit::process::lifecycle::{self, Lifecycle};
use service_kit::process::settings::SettingsReader;
use shared_contracts::booking_event::BookingEventType;
use shared_contracts::ids::{ReservationId, UserId};

/// The service allocates millions of small buffers per minute, which mimalloc does faster.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Price tiers, reservations, payment and tickets.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, PartialEq, Subcommand)]
enum Command {
    /// Serve requests until SIGTERM
    Serve,
    /// End due reservations, publish events and repair half-done work, until SIGTERM
    Worker,
    /// Migrate the database and exit
    Migrate,
    /// Check both databases against the eight promises; exits with 2 if one is broken
    Audit {
        /// Print the whole report as JSON
        #[arg(long)]
        json: bool,
        /// Seconds between the two passes; a difference that only one pass finds does not count
        #[arg(long, default_value_t = 10)]
        settle_seconds: u64,
        /// Seconds that an expiry, a refund or an event may be late
        #[arg(long, default_value_t = 60)]
        late_seconds: u64,
    },
    /// Publish stored events again; harmless when repeated
    Replay {
        /// Only events that were committed at this time (RFC 3339) or later
        #[arg(long, required_unless_present = "reservation_id")]
        from: Option<DateTime<Utc>>,
        /// Only events that were committed before this time
        #[arg(long)]
        to: Option<DateTime<Utc>>,
        /// Only events of this type, such as reservation.confirmed
        #[arg(long, value_parser = event_type)]
        event_type: Option<BookingEventType>,
        /// Only events of this reservation
        #[arg(long)]
        reservation_id: Option<ReservationId>,
    },
    /// Print an access token signed with JWT_SECRET, for local trials
    Token {
        /// The user that the token is for: a UUID
        #[arg(long)]
        user: UserId,
        /// A role of the user besides customer: organizer or admin; repeat the option for both
        #[arg(long, default_value = "customer")]
        role: Vec<Role>,
        /// Minutes until the token expires
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=1440))]
        minutes: u64,
    },
    /// Print the OpenAPI document
    Openapi,
    /// Print all settings with their defaults, as Markdown
    Settings {
        /// Print lines for an .env file instead
        #[arg(long)]
        env_file: bool,
    },
    /// Check that the running process on PORT is ready; exits with 1 if it is not
    Healthcheck,
}

fn event_type(name: &str) -> Result<BookingEventType, String> {
    let names = BookingEventType::ALL.map(BookingEventType::routing_key);
    let known = BookingEventType::ALL.into_iter().find(|known| known.routing_key() == name);
    known.ok_or_else(|| format!("must be one of {}", names.join(", ")))
}

/// Signs the token with the settings that the services verify tokens with.
fn token(user: UserId, roles: &[Role], lifetime: Duration) -> anyhow::Result<String> {
    let mut reader = SettingsReader::from_env();
    reader.refuse_in_production("this command makes tokens for trials only; real users get theirs from the login");
    let settings = JwtSettings::read(&mut reader, &Trust::default());
    let settings = reader.finish(settings)?.context("the settings for tokens (`JWT_...`) are incomplete")?;
    tokens::mint(&settings, user, roles, lifetime)
}

fn main() -> ExitCode {
    tls::install_crypto_provider();
    lifecycle::avoid_huge_pages();
    lifecycle::run(run(Arguments::parse().command))
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    if command == Command::Openapi {
        println!("{}", app::skeleton()?.1.to_pretty_json()?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Settings { env_file } = command {
        print!("{}", Settings::reference(env_file));
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Token { user, role, minutes } = &command {
        println!("{}", token(*user, role, Duration::from_secs(60 * minutes))?);
        return Ok(ExitCode::SUCCESS);
    }
    if command == Command::Healthcheck {
        server::healthcheck(SettingsReader::from_env(), 8001).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::read(SettingsReader::from_env(), if command == Command::Worker { 8002 } else { 8001 })?;
    telemetry::init(&settings.common)?;
    match command {
        Command::Migrate => {
            database::connect(&settings.database_url, "booking-service", 1, &schema::MIGRATIONS).await?;
        }
        Command::Audit { json, settle_seconds, late_seconds } => {
            let window =
                AuditWindow { settle: Duration::from_secs(settle_seconds), late: Duration::from_secs(late_seconds) };
            return audit(&settings, window, json).await;
        }
        Command::Replay { from, to, event_type, reservation_id } => {
            let request = ReplayRequest { from, to, event_type, reservation_id, ..ReplayRequest::default() };
            println!("{} events published again", replay_all(&settings, request).await?);
        }
        Command::Worker => return run_process(&settings, "booking-worker", true).await,
        _ => return run_process(&settings, "booking-service", false).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn audit(settings: &Settings, window: AuditWindow, json: bool) -> anyhow::Result<ExitCode> {
    let app = app::for_command(settings, "audit")?;
    let report = audit::audit(&app, &settings.broker, &settings.queue, window).await?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(if report.is_clean() { 0 } else { 2 }))
}

/// Publishes all pages of `request`, and returns the number of events.
async fn replay_all(settings: &Settings, mut request: ReplayRequest) -> anyhow::Result<usize> {
    let app = app::for_command(settings, "replay")?;
    let mut published = 0;
    loop {
        let page = replay::replay(&app.db, &app.publisher, &request).await?;
        published += page.published;
        request.cursor = page.next_cursor;
        if request.cursor.is_none() {
            return Ok(published);
        }
    }
}

/// Runs the service or the worker until SIGTERM.
async fn run_process(settings: &Settings, name: &'static str, is_worker: bool) -> anyhow::Result<ExitCode> {
    let export = traces::start(&settings.common.traces, name, env!("CARGO_PKG_VERSION"))?;
    let lifecycle = Lifecycle::new();
    lifecycle.stop_on_signal()?;
    let listener = server::listen(settings.common.listen).await?;
    let started = async {
        if is_worker {
            let app = app::start(settings, name, &lifecycle).await?;
            app::work(&app, settings, listener, &lifecycle).await
        } else {
            settings.common.auth.warn();
            let app = app::start(settings, name, &lifecycle).await?;
            app::serve(&app, settings, listener, &lifecycle);
            Ok(())
        }
    };
    // A stop does not wait for a database that is still starting.
    lifecycle.token().run_until_cancelled(started).await.transpose()?;
    let code = lifecycle.finished().await;
    export.finish().await;
    Ok(code)
}
