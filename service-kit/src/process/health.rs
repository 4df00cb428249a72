//! The health of the process: `/health` for people, `/health/live` and `/health/ready` for orchestrators.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures::future::join_all;
use serde::Serialize;
use sqlx::PgPool;
use tokio::sync::Mutex;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// The time limit of one check. A part that answers later counts as down.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

type Probe = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> + Send + Sync>;

/// The checks that decide the health of a process.
#[derive(Clone)]
pub struct Health {
    service: &'static str,
    version: &'static str,
    checks: Vec<Check>,
    /// The last report, and when its checks ended.
    latest: Arc<Mutex<Option<(Instant, HealthReport)>>>,
}

#[derive(Clone)]
struct Check {
    name: &'static str,
    needed: bool,
    probe: Probe,
}

/// The answer of `/health`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct HealthReport {
    /// `healthy`; `degraded` if an optional part is down; `unhealthy` if a needed part is down.
    pub status: Status,
    /// The service's name.
    #[schema(example = "event-service")]
    pub service: &'static str,
    /// The version of the running program.
    #[schema(example = "0.1.0")]
    pub version: &'static str,
    /// The state of each part, by its name.
    pub checks: BTreeMap<&'static str, PartStatus>,
}

/// The state of the service as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every part that the service uses answers.
    Healthy,
    /// An optional part is down; the service works without it.
    Degraded,
    /// A needed part is down.
    Unhealthy,
}

/// The state of one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PartStatus {
    /// The part answers in time.
    Up,
    /// The part does not answer within a second, or it answers with an error.
    Down,
}

impl Health {
    /// Starts without parts; add them with [`Self::needs`] and [`Self::uses`].
    #[must_use]
    pub fn new(service: &'static str, version: &'static str) -> Self {
        Self { service, version, checks: Vec::new(), latest: Arc::default() }
    }

    /// Adds a part that the service can't work without.
    #[must_use]
    pub fn needs<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
        self,
        name: &'static str,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self {
        self.with(name, true, probe)
    }

    /// Adds an optional part. While it is down, the service is `degraded` and still works.
    #[must_use]
    pub fn uses<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
        self,
        name: &'static str,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self {
        self.with(name, false, probe)
    }

    /// Adds the service's own database.
    #[must_use]
    pub fn needs_database(self, pool: PgPool) -> Self {
        self.needs("database", move || {
            let pool = pool.clone();
            async move { Ok(sqlx::query("select 1").execute(&pool).await.map(drop)?) }
        })
    }

    fn with<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
        mut self,
        name: &'static str,
        needed: bool,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self {
        self.checks.push(Check { name, needed, probe: Arc::new(move || Box::pin(probe())) });
        self
    }

    /// Runs the checks, or shares the result of a run in progress. No limit applies to these requests, so a crowd of
    /// callers must not multiply the checks: each part has at most one at a time.
    async fn report(&self) -> HealthReport {
        let asked = Instant::now();
        let mut latest = self.latest.lock().await;
        if let Some((_, report)) = latest.as_ref().filter(|(over, _)| *over >= asked) {
            return report.clone();
        }
        let report = self.check().await;
        *latest = Some((Instant::now(), report.clone()));
        report
    }

    async fn check(&self) -> HealthReport {
        let outcomes = join_all(self.checks.iter().map(async |check| {
            let outcome =
                tokio::time::timeout(CHECK_TIMEOUT, (check.probe)()).await.map_err(anyhow::Error::from).flatten();
            if let Err(error) = &outcome {
                tracing::debug!(part = check.name, error = format!("{error:#}"), "A part does not answer");
            }
            (check, outcome.is_ok())
        }))
        .await;
        let status = if outcomes.iter().any(|(check, up)| check.needed && !up) {
            Status::Unhealthy
        } else if outcomes.iter().any(|(_, up)| !up) {
            Status::Degraded
        } else {
            Status::Healthy
        };
        let checks = outcomes
            .into_iter()
            .map(|(check, up)| (check.name, if up { PartStatus::Up } else { PartStatus::Down }))
            .collect();
        HealthReport { status, service: self.service, version: self.version, checks }
    }
}

/// The health routes. Each service merges them into its own router.
pub fn routes(health: Health) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(get_health))
        .routes(routes!(get_liveness))
        .routes(routes!(get_readiness))
        .with_state(health)
}

/// Get the health of the service and its parts
///
/// `200` while the service can do its work, even if an optional part is down; `503` if a needed part is down.
#[utoipa::path(get, path = "/health", tag = "Health", responses(
    (status = 200, description = "Healthy or degraded", body = HealthReport),
    (status = 503, description = "A needed part is down", body = HealthReport),
))]
async fn get_health(State(health): State<Health>) -> (StatusCode, Json<HealthReport>) {
    let report = health.report().await;
    let code = if report.status == Status::Unhealthy { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, Json(report))
}

/// Check that the process answers
#[utoipa::path(get, path = "/health/live", tag = "Health", responses((status = 200, description = "Alive")))]
async fn get_liveness() -> StatusCode {
    StatusCode::OK
}

/// Check that the process can take requests now
#[utoipa::path(get, path = "/health/ready", tag = "Health", responses(
    (status = 200, description = "Ready", body = HealthReport),
    (status = 503, description = "A needed part is down", body = HealthReport),
))]
async fn get_readiness(health: State<Health>) -> (StatusCode, Json<HealthReport>) {
    get_health(health).await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn those_who_ask_at_the_same_time_share_a_look_and_the_next_gets_a_new_one() {
        let (checks, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let (counted, answered) = (Arc::clone(&checks), Arc::clone(&answer));
        let health = Health::new("service", "1").needs("part", move || {
            let (earlier, answered) = (counted.fetch_add(1, Ordering::Relaxed), Arc::clone(&answered));
            async move {
                answered.notified().await;
                anyhow::ensure!(earlier == 0, "down since");
                Ok(())
            }
        });
        let crowd = join_all((0..100).map(|_| health.report()));
        let (reports, ()) = tokio::join!(crowd, async { answer.notify_one() });
        assert!(reports.iter().all(|report| report.status == Status::Healthy));
        assert_eq!(checks.load(Ordering::Relaxed), 1);
        answer.notify_one();
        assert_eq!(health.report().await.status, Status::Unhealthy);
    }
}
