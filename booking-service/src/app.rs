//! Every route on one screen, and how the service's processes start and stop.

use std::sync::Arc;

use axum::Router;
use axum::http::Method;
use service_kit::admit::bulkheads::RequestClass;
use service_kit::auth::AuthSettings;
use service_kit::http::{openapi, query, server};
use service_kit::postgres::database;
use service_kit::process::common::Common;
use service_kit::process::health::{self, Health};
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::SettingsReader;
use tokio::net::TcpListener;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::schema::MIGRATIONS;
use crate::settings::Settings;
use crate::state::{App, AppState, Shared};
use crate::tickets::routes as tickets;
use crate::worker::{self, Audits, Schedule};
use crate::workflows::{confirm, create, end, outbox_relay, payment_webhook, read};
use crate::{price_tiers, replay};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Booking Service",
        description = "Price tiers, reservations, payment and tickets.\n\n\
            **New here?** Press *Authorize* and enter any UUID as your user id, or your access token if the service \
            requires one. The page sends it with every call. Create a price tier. Take a session and a seat from the \
            Event Service's seat map. `POST /api/v1/reservations`, confirm the reservation, and get your \
            ticket.\n\n\
            Only its owner and admins see a reservation or ticket; everyone else gets `404`.",
    ),
    tags((name = "1 Price tiers"), (name = "2 Reservations"), (name = "3 Tickets"), (name = "4 Administration"), (name = "5 Payment provider"), (name = "Health"))
)]
struct Document;

/// All routes, and the document that describes them.
fn api(app: &App, health: Health) -> (Router, utoipa::openapi::OpenApi) {
    let (routes, mut document) = OpenApiRouter::with_openapi(openapi::complete(Document::openapi()))
        .routes(routes!(price_tiers::create_price_tier, price_tiers::list_price_tiers))
        .routes(routes!(price_tiers::get_price_tier, price_tiers::update_price_tier, price_tiers::delete_price_tier))
        .routes(routes!(create::create_reservation, read::list_reservations))
        .routes(routes!(read::get_reservation, end::cancel_reservation))
        .routes(routes!(confirm::confirm_reservation))
        .routes(routes!(tickets::list_own_tickets))
        .routes(routes!(tickets::list_tickets))
        .routes(routes!(tickets::get_ticket))
        .routes(routes!(tickets::get_ticket_qr))
        .routes(routes!(end::refund_ticket))
        .routes(routes!(replay::replay_events))
        .routes(routes!(payment_webhook::take_payment_notice))
        // An alias of the same resource without `admin` in the path.
        .route(
            "/api/v1/price-tiers",
            axum::routing::post(price_tiers::create_price_tier).get(price_tiers::list_price_tiers),
        )
        .route(
            "/api/v1/price-tiers/{id}",
            axum::routing::get(price_tiers::get_price_tier)
                .patch(price_tiers::update_price_tier)
                .delete(price_tiers::delete_price_tier),
        )
        .with_state(AppState::new(app))
        .merge(health::routes(health))
        .merge(app.metrics.common.routes())
        .split_for_parts();
    openapi::refer_to_items(&mut document);
    openapi::describe_security(&mut document);
    openapi::describe_alias(&mut document, "/api/v1/admin/price-tiers", "/api/v1/price-tiers");
    openapi::share_errors(&mut document);
    (query::strict(routes, &document), document)
}

/// The class of a route, whose requests share a limit; `None` for an unknown route.
#[must_use]
pub fn request_class(method: &Method, path: &str) -> Option<RequestClass> {
    let changes = !method.is_safe();
    Some(match path {
        "/api/v1/reservations" if changes => RequestClass::Hold,
        "/api/v1/reservations" | "/api/v1/tickets" => RequestClass::Read,
        // A buyer that pays also loads this reservation and then the ticket.
        _ if path.starts_with("/api/v1/reservations/") || path.starts_with("/api/v1/tickets/") => RequestClass::Confirm,
        "/api/v1/payments/webhook" => RequestClass::Notice,
        _ if path.starts_with("/api/v1/admin/") || path.starts_with("/api/v1/price-tiers") => {
            if changes {
                RequestClass::Admin
            } else {
                RequestClass::Read
            }
        }
        _ => return None,
    })
}

/// The routes and the OpenAPI document without a database, Redis or broker, for the `openapi` command and for tests of
/// the routes.
///
/// # Errors
/// A metric or a default setting is wrong in the code; the environment can cause no error.
pub fn skeleton() -> anyhow::Result<(Router, utoipa::openapi::OpenApi)> {
    let settings = Settings::read(SettingsReader::new(|_| None), 8001)?;
    let db = database::lazy_pool(&settings.database_url, "openapi", 1)?;
    let app = Arc::new(Shared::new(&settings, db, "openapi", &Lifecycle::new())?);
    Ok(api(&app, Health::new("booking-service", env!("CARGO_PKG_VERSION"))))
}

/// Connects to the database, migrates it, and starts the tasks that both the service and the worker run.
///
/// # Errors
/// The database does not answer or can't be migrated.
pub async fn start(settings: &Settings, name: &'static str, lifecycle: &Lifecycle) -> anyhow::Result<App> {
    let db = database::connect(&settings.database_url, name, settings.database_connections_max, &MIGRATIONS).await?;
    let app = Arc::new(Shared::new(settings, db, name, lifecycle)?);
    watch(&app)?;
    let (relay, stopping) = (Arc::clone(&app), lifecycle.token().clone());
    lifecycle.spawn("outbox relay", async move { outbox_relay::relay(&relay, stopping).await });
    let (gate, stopping) = (Arc::clone(&app), lifecycle.token().clone());
    lifecycle.spawn("redis watch", async move { gate.locks.watch(stopping).await });
    let (client, stopping) = (Arc::clone(&app), lifecycle.token().clone());
    lifecycle.spawn("circuit watch", async move { client.event_service.watch(stopping).await });
    Ok(app)
}

/// Registers the metrics that are read from other parts at each scrape. Commands serve no metrics, so they do not call
/// this.
fn watch(app: &App) -> anyhow::Result<()> {
    app.metrics.common.watch_pools(&app.db, &app.batch_db)?;
    // A weak handle: the app owns its metrics, so a strong one would keep both alive for ever.
    let circuit = Arc::downgrade(app);
    app.metrics.common.before_encoding(move || {
        if let Some(app) = circuit.upgrade() {
            app.metrics.circuit_is_open(app.event_service.circuit().is_err());
        }
    });
    app.metrics.watch_outbox(&app.db);
    Ok(())
}

/// The app for a command such as `audit`. It does not migrate the database, and starts neither the relay nor the probes
/// of Redis and the circuit.
///
/// # Errors
/// A setting is not a valid address.
pub fn for_command(settings: &Settings, name: &'static str) -> anyhow::Result<App> {
    let db = database::lazy_pool(&settings.database_url, name, 4)?;
    Ok(Arc::new(Shared::new(settings, db, name, &Lifecycle::new())?))
}

/// Serves requests until `lifecycle` stops.
pub fn serve(app: &App, settings: &Settings, listener: TcpListener, lifecycle: &Lifecycle) {
    let (routes, mut document) = api(app, health(app, "booking-service"));
    openapi::narrow_security(&mut document, &settings.common.auth);
    let router = routes.merge(openapi::pages(&document));
    server::serve(lifecycle, listener, router, &settings.common, &app.metrics.common, request_class);
}

/// Runs the worker until `lifecycle` stops; its listener serves health checks and metrics.
///
/// # Errors
/// The scheduler can't be started.
pub async fn work(app: &App, settings: &Settings, listener: TcpListener, lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let schedule = Schedule {
        expiry: settings.expiry_interval,
        expiry_batch_size: settings.expiry_batch_size,
        reconcile: settings.reconcile_interval,
    };
    worker::start(app, schedule, lifecycle).await?;
    if let Some(interval) = settings.audit_interval {
        let (broker, queue) = (settings.broker.clone(), settings.queue.clone());
        let plan = Audits { interval, window: worker::AUDIT_WINDOW, broker, queue };
        let (app, stopping) = (Arc::clone(app), lifecycle.token().clone());
        lifecycle.spawn("audit", async move { worker::audit_again_and_again(&app, &plan, &stopping).await });
    }
    let router = health::routes(health(app, "booking-worker")).merge(app.metrics.common.routes()).into();
    // Health checks and metrics need no login, so the worker does not read the keys of tokens.
    let limits = Common { auth: AuthSettings::default(), ..settings.common.clone() };
    server::serve(lifecycle, listener, router, &limits, &app.metrics.common, request_class);
    Ok(())
}

fn health(app: &App, service: &'static str) -> Health {
    let (event_service, circuit) = (Arc::clone(app), Arc::clone(app));
    let (locks, broker) = (Arc::clone(app), Arc::clone(app));
    Health::new(service, env!("CARGO_PKG_VERSION"))
        .needs_database(app.db.clone())
        .uses("event_service", move || {
            let app = Arc::clone(&event_service);
            async move { app.event_service.ping().await }
        })
        .uses("event_service_circuit", move || {
            let app = Arc::clone(&circuit);
            async move { app.event_service.circuit() }
        })
        .uses("redis", move || {
            let app = Arc::clone(&locks);
            async move { app.locks.ping().await }
        })
        .uses("rabbitmq", move || {
            let app = Arc::clone(&broker);
            async move { app.publisher.connect_if_needed().await }
        })
}
