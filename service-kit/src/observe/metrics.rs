//! The metrics of a process, which Prometheus fetches from `/metrics`.
//!
//! Events are counted where they happen, by an atomic addition. Some metrics need a query, such as of a database. The
//! process queries only when somebody fetches the metrics, never during a request: see [`Metrics::ask`]. The registry
//! is a value, so tests can run several services in one process.
//!
//! Labels have few values, all known beforehand: routes by their template, problems by their code. The registry would
//! keep each new value for ever.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
pub use prometheus::{GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGauge};
use prometheus::{HistogramOpts, Opts, Registry, TextEncoder};
use sqlx::PgPool;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::error::{Error, Result};
use crate::postgres::database::BatchPool;

/// The path of the metrics. Requests to it are not measured.
pub const METRICS_PATH: &str = "/metrics";

/// Bounds of durations in seconds, closest around the promised times: availability 50 ms, hold 100 ms, booking 300 ms.
const DURATIONS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0];
/// The time limit of one query. Prometheus itself waits ten seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// For at least this long, the values of a query count as current.
const FRESH_FOR: Duration = Duration::from_secs(2);
/// A query takes at most one part in this many of all time: one that takes a second runs every 20 seconds.
const REST: u32 = 20;

/// The registry of a process's metrics, and the functions that refresh them. Clones share one registry.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    requests: HistogramVec,
    in_flight: IntGauge,
    before_encoding: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    questions: Mutex<Vec<Arc<Question>>>,
    answered: GaugeVec,
}

/// Gauges whose values need a query.
struct Question {
    about: &'static str,
    gauges: Vec<GaugeVec>,
    ask: Box<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>,
    /// When the query last ended, and how long it took.
    asked: tokio::sync::Mutex<Option<(Instant, Duration)>>,
}

impl Metrics {
    /// Creates the registry with the metrics of HTTP requests and those that the kernel keeps of the process.
    ///
    /// # Errors
    /// None that depends on the environment.
    pub fn new(service: &str, version: &str) -> anyhow::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let build =
            GaugeVec::new(Opts::new("build_info", "1, with the program's name and version."), &["service", "version"])?;
        build.with_label_values(&[service, version]).set(1.0);
        register(&registry, build)?;
        let opts = HistogramOpts::new(
            "http_request_duration_seconds",
            "From a request's arrival to the start of its answer, by route template.",
        );
        let requests = HistogramVec::new(opts.buckets(DURATIONS.to_vec()), &["method", "route", "status"])?;
        let in_flight =
            IntGauge::new("http_requests_in_flight", "Requests that are being processed, or wait to be refused.")?;
        let answered = Opts::new(
            "metrics_question_answered",
            "1 if the last query for these metrics succeeded; 0 if not, and then they are omitted.",
        );
        let answered = GaugeVec::new(answered, &["about"])?;
        Ok(Self {
            inner: Arc::new(Inner {
                requests: register(&registry, requests)?,
                in_flight: register(&registry, in_flight)?,
                answered: register(&registry, answered)?,
                registry,
                before_encoding: Mutex::default(),
                questions: Mutex::default(),
            }),
        })
    }

    /// Registers a counter without labels.
    ///
    /// # Errors
    /// The name is taken or invalid.
    pub fn counter(&self, name: &str, help: &str) -> anyhow::Result<IntCounter> {
        register(&self.inner.registry, IntCounter::new(name, help)?)
    }

    /// Registers counters, one for each combination of their labels' values.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<IntCounterVec> {
        register(&self.inner.registry, IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers a gauge without labels.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn gauge(&self, name: &str, help: &str) -> anyhow::Result<IntGauge> {
        register(&self.inner.registry, IntGauge::new(name, help)?)
    }

    /// Registers gauges, one for each combination of their labels' values. A gauge that was never set is absent.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<GaugeVec> {
        register(&self.inner.registry, GaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers histograms of durations in seconds, with bounds from 1 ms to 10 s.
    ///
    /// # Errors
    /// As [`Self::counter`].
    pub fn durations(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<HistogramVec> {
        let opts = HistogramOpts::new(name, help).buckets(DURATIONS.to_vec());
        register(&self.inner.registry, HistogramVec::new(opts, labels)?)
    }

    /// Calls `update` on each fetch of the metrics, to set gauges whose values need no wait.
    pub fn before_encoding(&self, update: impl Fn() + Send + Sync + 'static) {
        self.inner.before_encoding.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(update));
    }

    /// Calls `ask` on a fetch of the metrics, to set `gauges` by a query. It runs at most every two seconds, and for at
    /// most a twentieth of the time. If it fails or takes longer than two seconds, `gauges` are absent: an old value
    /// would seem current.
    pub fn ask<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
        &self,
        about: &'static str,
        gauges: &[&GaugeVec],
        ask: impl Fn() -> F + Send + Sync + 'static,
    ) {
        let question = Question {
            about,
            gauges: gauges.iter().map(|gauge| (*gauge).clone()).collect(),
            ask: Box::new(move || ask().boxed()),
            asked: tokio::sync::Mutex::default(),
        };
        self.inner.questions.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(question));
    }

    /// Adds the metrics of a service's two connection pools: idle and used connections, and their maximum.
    ///
    /// # Errors
    /// As [`Self::counter`]; call it once.
    pub fn watch_pools(&self, requests: &PgPool, desks: &BatchPool) -> anyhow::Result<()> {
        let connections = self.gauges("db_pool_connections", "Open connections to PostgreSQL.", &["pool", "state"])?;
        let max = self.gauges("db_pool_connections_max", "Connections that a pool may open.", &["pool"])?;
        let (requests, desks) = (requests.clone(), desks.clone());
        self.before_encoding(move || {
            for (name, pool, kept) in [("requests", &requests, 0), ("desks", desks.pool(), desks.kept_count())] {
                // The numbers change while they are read, so the results are kept within bounds.
                let (size, idle) = (f64::from(pool.size()), (pool.num_idle() + kept) as f64);
                connections.with_label_values(&[name, "idle"]).set(idle.min(size));
                connections.with_label_values(&[name, "used"]).set((size - idle).max(0.0));
                max.with_label_values(&[name]).set(f64::from(pool.options().get_max_connections()));
            }
        });
        Ok(())
    }

    /// The route `/metrics`. Each service merges it into its own router.
    pub fn routes(&self) -> OpenApiRouter {
        OpenApiRouter::new().routes(routes!(get_metrics)).with_state(self.clone())
    }

    /// Adds a layer that measures the requests of a finished router.
    pub fn measure(&self, router: Router) -> Router {
        router.layer(from_fn_with_state(self.clone(), measure))
    }

    /// Refreshes all metrics and returns them in Prometheus' text format.
    ///
    /// # Errors
    /// The metrics can't be encoded.
    pub async fn text(&self) -> anyhow::Result<String> {
        for update in self.inner.before_encoding.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            update();
        }
        let questions = self.inner.questions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        join_all(questions.iter().map(|question| question.answer(&self.inner.answered))).await;
        TextEncoder::new().encode_to_string(&self.inner.registry.gather()).context("the metrics can't be encoded")
    }
}

impl Question {
    async fn answer(&self, answered: &GaugeVec) {
        // Concurrent fetches share one query.
        let mut asked = self.asked.lock().await;
        if asked.is_some_and(|(when, took)| when.elapsed() < FRESH_FOR.max(took * REST)) {
            return;
        }
        let begun = Instant::now();
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, (self.ask)()).await.map_err(anyhow::Error::from).flatten();
        if let Err(error) = &answer {
            tracing::debug!(about = self.about, error = format!("{error:#}"), "A query for metrics failed");
            self.gauges.iter().for_each(GaugeVec::reset);
        }
        answered.with_label_values(&[self.about]).set(if answer.is_ok() { 1.0 } else { 0.0 });
        *asked = Some((Instant::now(), begun.elapsed()));
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> anyhow::Result<C> {
    registry.register(Box::new(metric.clone())).context("a metric's name is taken or invalid")?;
    Ok(metric)
}

/// Get the metrics of this process in Prometheus' text format
#[utoipa::path(get, path = "/metrics", tag = "Health", responses((status = 200, description = "All metrics", body = String, content_type = "text/plain")))]
async fn get_metrics(State(metrics): State<Metrics>) -> Result<Response> {
    let text = metrics.text().await.map_err(Error::Internal)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// Counts a request in flight until it is dropped, so that a client that hangs up does not stay counted.
struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

async fn measure(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    if route == METRICS_PATH {
        return next.run(request).await;
    }
    let method = method_name(request.method());
    metrics.inner.in_flight.inc();
    let in_flight = InFlight(metrics.inner.in_flight.clone());
    let begun = Instant::now();
    let response = next.run(request).await;
    drop(in_flight);
    let status = response.status();
    metrics.inner.requests.with_label_values(&[method, route, status.as_str()]).observe(begun.elapsed().as_secs_f64());
    response
}

/// The label value of a method. Clients may send any word as a method, so all unknown ones share `other`.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn requests_are_measured_by_the_template_of_their_route() {
        let metrics = Metrics::new("service", "1").unwrap();
        let routes = Router::new().route("/seats/{id}", get(async || "")).merge(Router::from(metrics.routes()));
        let router = metrics.measure(routes);
        for path in ["/seats/1", "/seats/2", "/nowhere", "/metrics"] {
            let request = Request::builder().method("GET").uri(path).body(Body::empty()).unwrap();
            router.clone().oneshot(request).await.unwrap();
        }
        let strange = Request::builder().method("BREW").uri("/seats/1").body(Body::empty()).unwrap();
        router.clone().oneshot(strange).await.unwrap();
        let text = metrics.text().await.unwrap();
        for line in [
            r#"http_request_duration_seconds_count{method="GET",route="/seats/{id}",status="200"} 2"#,
            r#"http_request_duration_seconds_count{method="GET",route="none",status="404"} 1"#,
            r#"http_request_duration_seconds_count{method="other",route="/seats/{id}",status="405"} 1"#,
            "http_requests_in_flight 0",
            r#"build_info{service="service",version="1"} 1"#,
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is missing in:\n{text}");
        }
        assert!(!text.contains(r#"route="/metrics""#) && text.contains("process_resident_memory_bytes"), "{text}");
    }

    #[tokio::test]
    async fn a_client_that_hangs_up_is_not_in_flight_any_more() {
        let metrics = Metrics::new("service", "1").unwrap();
        let router = metrics.measure(Router::new().route("/slow", get(std::future::pending::<()>)));
        let request = Request::builder().uri("/slow").body(Body::empty()).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), router.oneshot(request)).await.is_err());
        assert_eq!(metrics.inner.in_flight.get(), 0);
    }

    #[tokio::test]
    async fn what_can_not_be_asked_is_absent_and_not_old() {
        let metrics = Metrics::new("service", "1").unwrap();
        let depth = metrics.gauges("depth", "Of something.", &["of"]).unwrap();
        let (broken, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (gauge, is_broken, count) = (depth.clone(), Arc::clone(&broken), Arc::clone(&asked));
        metrics.ask("depths", &[&depth], move || {
            let (gauge, broken) = (gauge.clone(), is_broken.load(Ordering::Relaxed));
            count.fetch_add(1, Ordering::Relaxed);
            async move {
                anyhow::ensure!(!broken, "away");
                gauge.with_label_values(&["sea"]).set(7.0);
                Ok(())
            }
        });
        let forget = || *metrics.inner.questions.lock().unwrap()[0].asked.try_lock().unwrap() = None;
        assert!(metrics.text().await.unwrap().contains(r#"depth{of="sea"} 7"#));
        metrics.text().await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 1, "asked again at once");
        broken.store(true, Ordering::Relaxed);
        forget();
        let text = metrics.text().await.unwrap();
        assert!(!text.contains("depth{") && text.contains(r#"metrics_question_answered{about="depths"} 0"#), "{text}");
    }
}
