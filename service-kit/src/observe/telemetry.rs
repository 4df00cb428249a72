//! Structured logs on standard output.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

use crate::process::common::{Common, LogFormat};

/// Filters for libraries that log too much, or that repeat what our own lines report together with its consequence. A
/// directive in `LOG_LEVEL` overrides them.
const QUIET: &str = "sqlx::postgres::notice=warn,tokio_cron_scheduler=warn,lapin=off";

/// Starts logging for this process. A second call, as tests make, changes nothing.
///
/// # Errors
/// `LOG_LEVEL` is not a filter.
pub fn init(common: &Common) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(format!("{QUIET},{}", common.log_level))
        .map_err(|error| anyhow::anyhow!("LOG_LEVEL={} can't be used: {error}", common.log_level))?;
    let builder = fmt().with_env_filter(filter).with_target(true).with_ansi(std::io::stdout().is_terminal());
    let outcome = match common.log_format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
        LogFormat::Pretty => builder.try_init(),
    };
    if outcome.is_err() {
        tracing::debug!("logging had been started before");
    }
    Ok(())
}
