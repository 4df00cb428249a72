//! Traces show which request caused what, in this process and the others. Any collector that accepts OTLP can receive
//! them.
//!
//! Tracing is on if `OTEL_EXPORTER_OTLP_ENDPOINT` is set. The process decides on sampling once, when a request arrives.
//! A request that is not sampled costs only that decision, because every function here checks it first. In any case
//! [`traceparent`] passes the trace context (W3C) on: into calls of other services, the outbox, and messages.
//!
//! The code begins spans by hand, where a step begins; log lines have spans of their own. The library that joins the
//! two would also do its work for requests that are not sampled.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Context as _;
use axum::http::{Method, StatusCode};
use opentelemetry::context::FutureExt;
use opentelemetry::trace::{
    SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
    TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{Compression, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

use crate::http::error::{self, Error};
use crate::http::request_context;
use crate::process::settings::{Secret, SettingsReader};

/// How long a stop waits for the collector to accept the last spans.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Routes without traces, by the beginning of their path: monitoring requests them all the time.
const NOT_TRACED: [&str; 2] = ["/health", "/metrics"];

/// The one tracer of the process. Without it, this module only passes on the trace contexts that it receives.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// The settings of trace export, from OpenTelemetry's standard variables.
#[derive(Debug, Clone, Default)]
pub struct TraceSettings {
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT` and `/v1/traces`. Nothing is exported
    /// without one.
    endpoint: Option<String>,
    /// `OTEL_EXPORTER_OTLP_HEADERS`: `name=value` pairs with commas between them, such as a key.
    headers: Option<Secret>,
    /// `OTEL_EXPORTER_OTLP_COMPRESSION`: `gzip` or `none`.
    gzip: bool,
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`. `None` if the name is unknown, which is a startup fault.
    sampler: Option<Sampler>,
    /// `OTEL_SERVICE_NAME`. If it is not set, the export uses the process's own name.
    service: Option<String>,
}

impl TraceSettings {
    /// Reads the `OTEL_*` settings.
    pub fn read(reader: &mut SettingsReader) -> Self {
        let base = reader.optional("OTEL_EXPORTER_OTLP_ENDPOINT");
        let endpoint = reader
            .optional("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
            .or_else(|| base.map(|base| format!("{}/v1/traces", base.trim_end_matches('/'))));
        if let Some(fault) = endpoint.as_deref().and_then(|url| reqwest::Url::parse(url).err()) {
            reader.fault(format!("OTEL_EXPORTER_OTLP_ENDPOINT is not a URL like http://jaeger:4318: {fault}"));
        }
        let compression = reader.or("OTEL_EXPORTER_OTLP_COMPRESSION", "none".to_owned());
        if !["gzip", "none"].contains(&compression.as_str()) {
            reader.fault(format!("OTEL_EXPORTER_OTLP_COMPRESSION={compression} is neither gzip nor none"));
        }
        let protocol = reader.or("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".to_owned());
        if protocol != "http/protobuf" {
            reader.fault(format!("OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not supported; use http/protobuf"));
        }
        let ratio = reader.within("OTEL_TRACES_SAMPLER_ARG", 1.0, 0.0, 1.0);
        let name = reader.or("OTEL_TRACES_SAMPLER", "parentbased_always_on".to_owned());
        let sampler = sampler(&name, ratio);
        if sampler.is_none() {
            reader.fault(format!(
                "OTEL_TRACES_SAMPLER={name} is not known; most services use parentbased_traceidratio with OTEL_TRACES_SAMPLER_ARG=0.01"
            ));
        }
        Self {
            endpoint: endpoint.filter(|_| !reader.or("OTEL_SDK_DISABLED", false)),
            headers: reader.optional("OTEL_EXPORTER_OTLP_HEADERS").map(|headers| Secret::from(headers.as_str())),
            gzip: compression == "gzip",
            sampler,
            service: reader.optional("OTEL_SERVICE_NAME"),
        }
    }
}

fn sampler(name: &str, ratio: f64) -> Option<Sampler> {
    Some(match name {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => Sampler::TraceIdRatioBased(ratio),
        _ => Sampler::ParentBased(Box::new(sampler(name.strip_prefix("parentbased_")?, ratio)?)),
    })
}

/// The exporter of spans. [`Export::finish`] sends the last ones before the process ends.
pub struct Export(Option<SdkTracerProvider>);

/// Starts the export of traces if an endpoint is set.
///
/// # Errors
/// The exporter can't be built.
pub fn start(settings: &TraceSettings, service: &'static str, version: &'static str) -> anyhow::Result<Export> {
    let Some(endpoint) = &settings.endpoint else { return Ok(Export(None)) };
    // The exporter's HTTP client blocks and belongs to the sending thread. The library creates it in a thread of its
    // own, so async code may call this function.
    let mut exporter = SpanExporter::builder().with_http().with_endpoint(endpoint);
    if let Some(headers) = &settings.headers {
        let pairs = headers.reveal().split(',').filter_map(|pair| pair.split_once('='));
        let pairs: HashMap<_, _> =
            pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect();
        exporter = exporter.with_headers(pairs);
    }
    if settings.gzip {
        exporter = exporter.with_compression(Compression::Gzip);
    }
    let resource = Resource::builder()
        .with_service_name(settings.service.clone().unwrap_or_else(|| service.to_owned()))
        .with_attribute(KeyValue::new("service.version", version))
        .build();
    let mut provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter.build().context("traces can't be exported")?)
        .with_resource(resource);
    if let Some(sampler) = &settings.sampler {
        provider = provider.with_sampler(sampler.clone());
    }
    let provider = provider.build();
    if TRACER.set(provider.tracer("ticketing")).is_err() {
        tracing::debug!("the export of traces had been started before");
    }
    tracing::info!(endpoint, "Traces are exported");
    Ok(Export(Some(provider)))
}

impl Export {
    /// Sends the remaining spans, within three seconds at most.
    pub async fn finish(self) {
        let Some(provider) = self.0 else { return };
        let sent = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(CLOSE_TIMEOUT)).await;
        if !matches!(sent, Ok(Ok(()))) {
            tracing::info!("The collector did not accept the last traces");
        }
    }
}

/// Parses a `traceparent` header; `None` if it is not valid.
fn parse(header: &str) -> Option<SpanContext> {
    let mut parts = header.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex =
        |text: &str, length| text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_hex(version, 2) || version == "ff" || !is_hex(trace, 32) || !is_hex(span, 16) || !is_hex(flags, 2) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()? & TraceFlags::SAMPLED.to_u8());
    let context =
        SpanContext::new(TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?, flags, true, TraceState::NONE);
    context.is_valid().then_some(context)
}

fn header_of(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
}

/// The trace id in a `traceparent`, for log lines; `None` if the header is not valid.
#[must_use]
pub fn trace_id(traceparent: &str) -> Option<&str> {
    parse(traceparent).and_then(|_| traceparent.get(3..35))
}

/// The trace context to send along with work for the current request. It is that of the current span, or the one that
/// came with the request.
#[must_use]
pub fn traceparent() -> Option<String> {
    let own =
        Context::map_current(|context| context.has_active_span().then(|| header_of(context.span().span_context())));
    own.or_else(request_context::traceparent)
}

/// Begins a child span; `None` without a tracer or if the parent is not sampled.
fn begin(parent: &Context, name: impl Into<Cow<'static, str>>, kind: SpanKind) -> Option<Context> {
    let tracer = TRACER.get()?;
    if !parent.span().span_context().is_sampled() {
        return None;
    }
    Some(parent.with_span(tracer.build_with_context(SpanBuilder::from_name(name).with_kind(kind), parent)))
}

fn begin_here(name: impl Into<Cow<'static, str>>, kind: SpanKind) -> Option<Context> {
    TRACER.get()?;
    Context::map_current(|parent| begin(parent, name, kind))
}

/// Runs a call of another service inside a span; `work` may send [`traceparent`] along.
///
/// # Errors
/// Those of `work`.
pub async fn call<T, E: Display>(
    method: &Method,
    url: &str,
    work: impl Future<Output = Result<(StatusCode, T), E>>,
) -> Result<(StatusCode, T), E> {
    let Some(context) = begin_here(method.to_string(), SpanKind::Client) else { return work.await };
    let outcome = work.with_context(context.clone()).await;
    let span = context.span();
    span.set_attribute(KeyValue::new("http.request.method", method.to_string()));
    span.set_attribute(KeyValue::new("url.full", url.to_owned()));
    match &outcome {
        Ok((status, _)) => {
            span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
            if status.is_server_error() {
                span.set_status(Status::error(status.to_string()));
            }
        }
        Err(error) => span.set_status(Status::error(format!("{error:#}"))),
    }
    span.end();
    outcome
}

/// Runs a step of the current request inside a span.
///
/// # Errors
/// Those of `work`.
pub async fn step<T>(name: &'static str, work: impl Future<Output = error::Result<T>>) -> error::Result<T> {
    let Some(context) = begin_here(name, SpanKind::Internal) else { return work.await };
    finish(&context, work.with_context(context.clone()).await)
}

/// Runs work that no request caused, such as a task of the worker, inside a span that begins a new trace.
///
/// # Errors
/// Those of `work`.
pub async fn root<T>(name: &'static str, work: impl Future<Output = error::Result<T>>) -> error::Result<T> {
    let Some(tracer) = TRACER.get() else { return work.await };
    let context = Context::new();
    let context = context.with_span(tracer.build_with_context(SpanBuilder::from_name(name), &context));
    finish(&context, work.with_context(context.clone()).await)
}

fn finish<T>(context: &Context, outcome: error::Result<T>) -> error::Result<T> {
    let span = context.span();
    match &outcome {
        Ok(_) => {}
        // A refusal is an answer, so the span has no error.
        Err(Error::Refused(problem)) => span.set_attribute(KeyValue::new("refusal.code", problem.code.as_str())),
        Err(error) => span.set_status(Status::error(error.to_string())),
    }
    span.end();
    outcome
}

/// The span of an incoming request.
pub(crate) struct RequestSpan {
    /// The trace context that work for this request sends along.
    pub(crate) traceparent: Option<String>,
    context: Option<Context>,
}

impl RequestSpan {
    /// Decides whether the request is traced, and begins its span.
    pub(crate) fn of(traceparent: Option<String>, method: &Method, route: &str) -> Self {
        let traced = TRACER.get().filter(|_| !NOT_TRACED.iter().any(|path| route.starts_with(path)));
        let Some(tracer) = traced else { return Self { traceparent, context: None } };
        let caller = traceparent.as_deref().and_then(parse);
        let parent = caller.map_or_else(Context::new, |caller| Context::new().with_remote_span_context(caller));
        let span = tracer.build_with_context(SpanBuilder::from_name("request").with_kind(SpanKind::Server), &parent);
        let context = parent.with_span(span);
        let span = context.span();
        let traceparent = Some(header_of(span.span_context()));
        if !span.span_context().is_sampled() {
            return Self { traceparent, context: None };
        }
        span.update_name(format!("{method} {route}"));
        span.set_attribute(KeyValue::new("http.request.method", method.to_string()));
        span.set_attribute(KeyValue::new("http.route", route.to_owned()));
        Self { traceparent, context: Some(context) }
    }

    /// The span's context, for [`within`]; `None` if the request is not traced.
    pub(crate) fn context(&self) -> Option<Context> {
        self.context.clone()
    }

    pub(crate) fn answered(&self, status: StatusCode) {
        let Some(context) = &self.context else { return };
        let span = context.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        if status.is_server_error() {
            span.set_status(Status::error(status.to_string()));
        }
        span.end();
    }
}

/// Does the work of a request inside its span, if it has one.
pub(crate) async fn within<T>(context: Option<Context>, work: impl Future<Output = T>) -> T {
    match context {
        Some(context) => work.with_context(context).await,
        None => work.await,
    }
}

/// The span of a message to RabbitMQ. There is none if the request that caused the message was not sampled.
pub(crate) struct PublishSpan(Option<Context>);

impl PublishSpan {
    /// Begins the span. Afterwards `traceparent` has the trace context that the message must carry.
    pub(crate) fn begin(exchange: &str, routing_key: &str, traceparent: &mut Option<String>) -> Self {
        let cause = TRACER.get().and(traceparent.as_deref()).and_then(parse).filter(SpanContext::is_sampled);
        let cause = cause.map(|cause| Context::new().with_remote_span_context(cause));
        let context = cause.and_then(|cause| begin(&cause, format!("publish {routing_key}"), SpanKind::Producer));
        if let Some(context) = &context {
            messaging(context, "publish", exchange, routing_key);
            *traceparent = Some(header_of(context.span().span_context()));
        }
        Self(context)
    }

    pub(crate) fn finish(self, taken: bool) {
        let Some(context) = self.0 else { return };
        if !taken {
            context.span().set_status(Status::error("the broker did not take it"));
        }
        context.span().end();
    }
}

/// Handles a message inside a span that continues its sender's trace.
pub(crate) async fn received<T>(
    traceparent: Option<&str>,
    queue: &str,
    routing_key: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let sender = TRACER.get().and(traceparent).and_then(parse).filter(SpanContext::is_sampled);
    let sender = sender.map(|sender| Context::new().with_remote_span_context(sender));
    let Some(context) = sender.and_then(|sender| begin(&sender, format!("process {routing_key}"), SpanKind::Consumer))
    else {
        return work.await;
    };
    messaging(&context, "process", queue, routing_key);
    let outcome = work.with_context(context.clone()).await;
    if let Err(error) = &outcome {
        context.span().set_status(Status::error(format!("{error:#}")));
    }
    context.span().end();
    outcome
}

/// Records on the current span why a message was dead-lettered.
pub(crate) fn note_error(error: &anyhow::Error) {
    Context::map_current(|context| context.span().set_status(Status::error(format!("{error:#}"))));
}

fn messaging(context: &Context, operation: &'static str, destination: &str, routing_key: &str) {
    context.span().set_attributes([
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.operation.type", operation),
        KeyValue::new("messaging.destination.name", destination.to_owned()),
        KeyValue::new("messaging.rabbitmq.destination.routing_key", routing_key.to_owned()),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_is_read_as_w3c_says() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = parse(good).unwrap();
        assert_eq!((header_of(&context).as_str(), context.is_sampled()), (good, true));
        assert_eq!(trace_id(good), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        // A later version may have more at its end.
        assert!(parse("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more").is_some());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(trace_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let pairs = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "jaeger"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ];
        let lookup = move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let mut reader = SettingsReader::new(lookup);
        TraceSettings::read(&mut reader);
        let faults = reader.finish(()).unwrap_err().to_string();
        for (name, _) in pairs {
            assert!(faults.contains(name), "{name} is missing in: {faults}");
        }
    }
}
