//! The Booking Service's command line.

use std::process::ExitCode;

use booking_service::app;
use booking_service::settings::Settings;
use clap::{Parser, Subcommand};
use service_kit::lifecycle::{self, Lifecycle};
use service_kit::settings::SettingsReader;
use service_kit::{database, server, telemetry};

/// Price tiers, reservations, payment and tickets.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Subcommand)]
enum Command {
    /// Serve requests until SIGTERM
    Serve,
    /// End due reservations, publish events and heal what crashes left, until SIGTERM
    Worker,
    /// Bring the database schema up to date and end
    Migrate,
    /// Print the OpenAPI document
    Openapi,
    /// Ask the running process on PORT whether it is ready; exits 1 when it is not
    Healthcheck,
}

#[tokio::main]
async fn main() -> ExitCode {
    lifecycle::exit_code(run(Arguments::parse().command).await)
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    if command == Command::Openapi {
        println!("{}", app::skeleton()?.1.to_pretty_json()?);
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::read(SettingsReader::from_env(), if command == Command::Worker { 8002 } else { 8001 })?;
    telemetry::init(&settings.common)?;
    match command {
        Command::Healthcheck => server::healthcheck(settings.common.listen.port()).await?,
        Command::Migrate => {
            database::connect(&settings.database_url, "booking-service", 1, &app::MIGRATIONS).await?;
        }
        _ => {
            let lifecycle = Lifecycle::new();
            lifecycle.stop_on_signal()?;
            let listener = server::listen(settings.common.listen).await?;
            let started = async {
                if command == Command::Worker {
                    let app = app::start(&settings, "booking-worker", &lifecycle).await?;
                    app::work(&app, &settings, listener, &lifecycle).await
                } else {
                    telemetry::warn_of_header_authentication();
                    let app = app::start(&settings, "booking-service", &lifecycle).await?;
                    app::serve(&app, listener, &lifecycle);
                    Ok(())
                }
            };
            // A stop does not wait for a database that is still starting.
            lifecycle.token().run_until_cancelled(started).await.transpose()?;
            return Ok(lifecycle.finished().await);
        }
    }
    Ok(ExitCode::SUCCESS)
}
