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

/// The service allocates millions of small buffers per minute, which mimalloc does faster.
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
    /// Migrate the database and exit
    Migrate,
    /// List, requeue or drop dead-lettered messages
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// Print the OpenAPI document
    Openapi,
    /// Print all settings with their defaults, as Markdown
    Settings {
        /// Print lines for an .env file instead
        #[arg(long)]
        env_file: bool,
    },
    /// Check that the running service is ready; exits with 1 if it is not
    Healthcheck,
}

#[derive(Subcommand)]
enum DeadLetters {
    /// Print one message per line as JSON, oldest first, each with its reason
    List {
        /// The maximum number of messages
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Send messages to the queue again, once the cause of their failure is fixed
    Requeue(Chosen),
    /// Delete dead-lettered messages for good
    Drop(Chosen),
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Chosen {
    /// Only the messages with these ids
    #[arg(value_name = "MESSAGE_ID")]
    ids: Vec<Uuid>,
    /// All dead-lettered messages
    #[arg(long)]
    all: bool,
}

impl From<Chosen> for Which {
    fn from(chosen: Chosen) -> Self {
        if chosen.all { Self::All } else { Self::These(chosen.ids) }
    }
}

async fn run_dead_letters(letters: DeadLetters, settings: &Settings) -> anyhow::Result<()> {
    let (broker, queue) = (&settings.broker, settings.queue.as_str());
    let (done, messages) = match letters {
        DeadLetters::List { limit } => ("dead-lettered", dead_letters::list(broker, queue, limit).await?),
        DeadLetters::Requeue(chosen) => ("requeued", dead_letters::requeue(broker, queue, &chosen.into()).await?),
        DeadLetters::Drop(chosen) => ("dropped", dead_letters::drop(broker, queue, &chosen.into()).await?),
    };
    for letter in &messages {
        println!("{}", serde_json::to_string(letter)?);
    }
    eprintln!("{} messages {done}", messages.len());
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
    if let Command::Settings { env_file } = command {
        print!("{}", Settings::reference(env_file));
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Healthcheck = command {
        server::healthcheck(SettingsReader::from_env(), 8000).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::from_env()?;
    telemetry::init(&settings.common)?;
    match command {
        Command::Openapi | Command::Settings { .. } | Command::Healthcheck => {
            unreachable!("answered above, without settings")
        }
        Command::DeadLetters(letters) => run_dead_letters(letters, &settings).await?,
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
