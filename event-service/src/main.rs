//! The Event Service's command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use event_service::app;
use event_service::settings::Settings;
use service_kit::lifecycle::{self, Lifecycle};
use service_kit::{database, server, telemetry};

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
    /// Print the OpenAPI document
    Openapi,
    /// Ask the running service whether it is ready; exits 1 when it is not
    Healthcheck,
}

#[tokio::main]
async fn main() -> ExitCode {
    lifecycle::exit_code(run(Arguments::parse().command).await)
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    if let Command::Openapi = command {
        println!("{}", app::skeleton().1.to_pretty_json()?);
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::from_env()?;
    telemetry::init(&settings.common)?;
    match command {
        Command::Openapi => unreachable!("answered above, without settings"),
        Command::Healthcheck => server::healthcheck(settings.common.listen.port()).await?,
        Command::Migrate => {
            database::connect(&settings.database_url, "event-service", 1, &app::MIGRATIONS).await?;
        }
        Command::Serve => {
            telemetry::warn_of_header_authentication();
            let lifecycle = Lifecycle::new();
            lifecycle.stop_on_signal()?;
            let listener = server::listen(settings.common.listen).await?;
            // A stop does not wait for a database that is still starting.
            lifecycle.token().run_until_cancelled(app::run(settings, listener, &lifecycle)).await.transpose()?;
            return Ok(lifecycle.finished().await);
        }
    }
    Ok(ExitCode::SUCCESS)
}
