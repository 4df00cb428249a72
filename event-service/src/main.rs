//! The Event Service's command line.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use event_service::app;
use event_service::settings::Settings;
use event_service::state::MIGRATIONS;
use service_kit::amqp::dead_letters::{self, Which};
use service_kit::http::{server, tls};
use service_kit::observe::{telemetry, traces};
use service_kit::postgres::database;
use service_kit::process::lifecycle::{self, Lifecycle};
use service_kit::process::settings::SettingsReader;
use uuid::Uuid;

/// Millions of small buffers a minute.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Catalogue, seat maps, and who has a seat.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve requests and consume events until SIGTERM
    Serve,
    /// Bring the database schema up to date and end
    Migrate,
    /// Look at the messages that were set aside, send them again, or drop them
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// Print the OpenAPI document
    Openapi,
    /// Ask the running service whether it is ready; exits 1 when it is not
    Healthcheck,
}

#[derive(Subcommand)]
enum DeadLetters {
    /// One a line as JSON, oldest first, each with its reason
    List {
        /// How many at most
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Send them to the queue again, after what they failed of is mended
    Requeue(Chosen),
    /// Throw them away
    Drop(Chosen),
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Chosen {
    /// The messages with these ids
    #[arg(value_name = "MESSAGE_ID")]
    ids: Vec<Uuid>,
    /// All of them
    #[arg(long)]
    all: bool,
}

impl From<Chosen> for Which {
    fn from(chosen: Chosen) -> Self {
        if chosen.all { Self::All } else { Self::These(chosen.ids) }
    }
}

async fn deal_with(letters: DeadLetters, settings: &Settings) -> anyhow::Result<()> {
    let (broker, queue) = (&settings.broker, settings.queue.as_str());
    let (done, met) = match letters {
        DeadLetters::List { limit } => ("set aside", dead_letters::list(broker, queue, limit).await?),
        DeadLetters::Requeue(chosen) => ("sent again", dead_letters::requeue(broker, queue, &chosen.into()).await?),
        DeadLetters::Drop(chosen) => ("dropped", dead_letters::drop(broker, queue, &chosen.into()).await?),
    };
    for letter in &met {
        println!("{}", serde_json::to_string(letter)?);
    }
    eprintln!("{} messages {done}", met.len());
    Ok(())
}

fn main() -> ExitCode {
    tls::install_crypto_provider();
    lifecycle::avoid_huge_pages();
    lifecycle::run(run(Arguments::parse().command))
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    if let Command::Openapi = command {
        println!("{}", app::skeleton()?.1.to_pretty_json()?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Healthcheck = command {
        server::healthcheck(SettingsReader::from_env(), 8000).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::from_env()?;
    telemetry::init(&settings.common)?;
    match command {
        Command::Openapi | Command::Healthcheck => unreachable!("answered above, without settings"),
        Command::DeadLetters(letters) => deal_with(letters, &settings).await?,
        Command::Migrate => {
            database::connect(&settings.database_url, "event-service", 1, &MIGRATIONS).await?;
        }
        Command::Serve => {
            settings.common.auth.warn();
            let export = traces::start(&settings.common.traces, "event-service", env!("CARGO_PKG_VERSION"))?;
            let lifecycle = Lifecycle::new();
            lifecycle.stop_on_signal()?;
            let listener = server::listen(settings.common.listen).await?;
            // A stop does not wait for a database that is still starting.
            lifecycle.token().run_until_cancelled(app::run(settings, listener, &lifecycle)).await.transpose()?;
            let code = lifecycle.finished().await;
            export.finish().await;
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}
