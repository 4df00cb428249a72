//! Authorization: what each role may call, other users' data, trial tokens, and what production refuses.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use booking_service::app;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::auth::{AuthSettings, KeySource};
use service_kit::process::settings::Secret;
use service_kit::testing::login::Need::{self, Admin, Nothing, Organizer, Signature, User};
use service_kit::testing::login::{
    AUDIENCE, ISSUER, Login, SigningKey, assert_only_those_who_may_are_let_in, believing, claims, jwks,
};
use service_kit::testing::{operations_of, wait_until};
use tokio::net::TcpListener;
use tokio::process::Command;
use uuid::Uuid;

use crate::processes::event_binary;
use crate::support::{SOON, System, answer, text_of};

/// What each operation requires. An operation that is missing here, or that no longer exists, fails the test.
const NEEDS: &[(&str, Need)] = &[
    ("POST /api/v1/admin/price-tiers", Organizer),
    ("GET /api/v1/admin/price-tiers", Nothing),
    ("GET /api/v1/admin/price-tiers/{id}", Nothing),
    ("PATCH /api/v1/admin/price-tiers/{id}", Organizer),
    ("DELETE /api/v1/admin/price-tiers/{id}", Organizer),
    ("POST /api/v1/price-tiers", Organizer),
    ("GET /api/v1/price-tiers", Nothing),
    ("GET /api/v1/price-tiers/{id}", Nothing),
    ("PATCH /api/v1/price-tiers/{id}", Organizer),
    ("DELETE /api/v1/price-tiers/{id}", Organizer),
    ("POST /api/v1/reservations", User),
    ("GET /api/v1/reservations", User),
    ("GET /api/v1/reservations/{id}", User),
    ("DELETE /api/v1/reservations/{id}", User),
    ("POST /api/v1/reservations/{id}/confirm", User),
    ("GET /api/v1/tickets", User),
    ("GET /api/v1/tickets/user/{user_id}", User),
    ("GET /api/v1/tickets/{id}", User),
    ("GET /api/v1/tickets/{id}/qr", User),
    ("POST /api/v1/tickets/{id}/refund", User),
    ("POST /api/v1/admin/events/replay", Admin),
    ("POST /api/v1/payments/webhook", Signature),
    ("GET /metrics", Nothing),
    ("GET /health", Nothing),
    ("GET /health/live", Nothing),
    ("GET /health/ready", Nothing),
];

#[tokio::test]
async fn every_operation_admits_only_callers_that_meet_its_requirement() {
    let login = Login::new();
    let system = System::start_as(None, login.settings(), None, |_, _| ()).await;
    assert_only_those_who_may_are_let_in(&system.booking_base, &app::skeleton().unwrap().1, &login, NEEDS).await;
    system.finish().await;
}

#[tokio::test]
async fn a_journey_with_tokens_goes_through_both_services() {
    let system = System::start_behind(Login::new()).await;
    let sale = system.sale(3).await;
    let (id, user) = system.reserved(&sale, &[0, 1]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    system.seats_become(&sale, &["sold", "sold", "available"]).await;
    assert_eq!(system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await.as_array().unwrap().len(), 2);
    system.refund(&text_of(&paid["tickets"][0], "id"), user, 200).await;
    let (given_up, other) = system.reserved(&sale, &[2]).await;
    system.cancel(&given_up, other, 200).await;
    system.seats_become(&sale, &["available", "sold", "available"]).await;
    system.finish().await;
}

#[tokio::test]
async fn a_wrong_internal_key_is_refused_and_holds_no_seat() {
    let login = Login::new();
    let mut system = System::start_behind(login).await;
    let sale = system.sale(1).await;
    let stranger = AuthSettings::default();
    let common = service_kit::process::common::Common { auth: stranger, ..system.settings.common.clone() };
    system.settings = booking_service::settings::Settings { common, ..system.settings.clone() };
    let app = app::for_command(&system.settings, "stranger").unwrap();
    assert!(app.event_service.ping().await.is_err());
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
}

/// All rows of the tables that record a sale.
async fn rows(system: &System) -> BTreeMap<&'static str, Vec<Value>> {
    let mut all = BTreeMap::new();
    for (table, sql) in [
        ("reservations", "select to_jsonb(t) from reservations t order by id"),
        ("reservation_items", "select to_jsonb(t) from reservation_items t order by id"),
        ("tickets", "select to_jsonb(t) from tickets t order by id"),
        ("payments", "select to_jsonb(t) from payments t order by id"),
        ("refunds", "select to_jsonb(t) from refunds t order by id"),
        ("outbox", "select to_jsonb(t) - 'published_at' from outbox t order by id"),
    ] {
        all.insert(table, sqlx::query_scalar(sql).fetch_all(&system.app.db).await.unwrap());
    }
    all
}

/// Makes a user with a paid reservation of two tickets and a held reservation. Returns the user and the ids of all of
/// it.
async fn paid_and_held(system: &System) -> (Uuid, Vec<String>) {
    let sale = system.sale(3).await;
    let (paid, user) = system.reserved(&sale, &[0, 1]).await;
    let confirmed = system.confirm(&paid, user, None, 200).await;
    let held = text_of(&system.reserve(&sale, user, &[2], 201).await, "id");
    let mut ids = vec![user.to_string(), paid, held, sale.session.clone()];
    for ticket in confirmed["tickets"].as_array().unwrap() {
        ids.push(text_of(ticket, "id"));
    }
    (user, ids)
}

async fn assert_a_stranger_sees_nothing(system: System) {
    let (owner, ids) = paid_and_held(&system).await;
    system.settle().await;
    let (stranger, before) = (Uuid::now_v7(), rows(&system).await);
    let document = app::skeleton().unwrap().1;
    let mut tried = 0;
    let paths: Vec<&str> = NEEDS
        .iter()
        .filter(|(operation, need)| *need == User && operation.contains('{'))
        .map(|(operation, _)| operation.split_once(' ').unwrap().1)
        .collect();
    for path in paths {
        for id in &ids {
            for method in [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                let shown = path.replace("{id}", id).replace("{user_id}", id);
                let body = path.ends_with("/confirm").then(|| json!({ "payment_id": "pay_demo" }));
                let response = system.call(method.clone(), &shown, stranger, body.as_ref()).await;
                let asked = if method == Method::HEAD { Method::GET } else { method.clone() };
                let known = operations_of(&document).contains_key(&format!("{asked} {path}"));
                let (status, expected) = (response.status().as_u16(), if known { 404 } else { 405 });
                assert_eq!(status, expected, "{method} {shown}");
                let text = response.text().await.unwrap();
                assert!(
                    !text.contains(&owner.to_string()) || shown.contains(&owner.to_string()),
                    "{method} {shown}: {text}"
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 200, "only {tried} calls");
    assert_eq!(system.get("/api/v1/reservations", stranger, 200).await["items"], json!([]));
    assert_eq!(rows(&system).await, before, "a stranger has changed something");
    // The owner still sees all of it.
    system.get(&format!("/api/v1/reservations/{}", ids[1]), owner, 200).await;
    system.get(&format!("/api/v1/tickets/{}", ids[4]), owner, 200).await;
    system.finish().await;
}

#[tokio::test]
async fn what_one_user_owns_does_not_exist_for_another() {
    assert_a_stranger_sees_nothing(System::start_behind(Login::new()).await).await;
}

#[tokio::test]
async fn without_tokens_what_one_user_owns_does_not_exist_for_another() {
    assert_a_stranger_sees_nothing(System::start().await).await;
}

#[tokio::test]
async fn an_admin_reads_cancels_and_refunds_for_any_user() {
    let system = System::start_behind(Login::new()).await;
    let (owner, ids) = paid_and_held(&system).await;
    let admin = Uuid::now_v7();
    let call = async |method: Method, path: String, expected: u16| {
        let request = system.http.request(method, format!("{}{path}", system.booking_base));
        answer(system.by(admin, &["admin"], request).send().await.unwrap(), expected).await
    };
    assert_eq!(call(Method::GET, format!("/api/v1/reservations/{}", ids[1]), 200).await["user_id"], json!(owner));
    assert_eq!(call(Method::GET, format!("/api/v1/tickets/user/{owner}"), 200).await.as_array().unwrap().len(), 2);
    assert_eq!(call(Method::GET, format!("/api/v1/tickets/{}", ids[4]), 200).await["user_id"], json!(owner));
    let cancelled = call(Method::DELETE, format!("/api/v1/reservations/{}", ids[2]), 200).await;
    assert_eq!((&cancelled["status"], &cancelled["user_id"]), (&json!("cancelled"), &json!(owner)));
    assert_eq!(call(Method::POST, format!("/api/v1/tickets/{}/refund", ids[4]), 200).await["status"], "refunded");
    // A booking that crashed before it wrote its reservation leaves a row that belongs to nobody.
    let abandoned = Uuid::now_v7();
    let sql = "insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
               select $1, '00000000-0000-0000-0000-000000000000', session_id, 'expired', now() - interval '1 second', now(), 1, 0, ''
               from reservations limit 1";
    sqlx::query(sql).bind(abandoned).execute(&system.app.db).await.unwrap();
    for (method, rest) in [(Method::GET, ""), (Method::DELETE, ""), (Method::POST, "/confirm")] {
        call(method, format!("/api/v1/reservations/{abandoned}{rest}"), 404).await;
    }
    let own = call(Method::GET, "/api/v1/reservations".to_owned(), 200).await;
    assert_eq!(own["items"], json!([]), "the list has only the caller's own reservations, for admins too");
    let organizer =
        system.by(admin, &["organizer"], system.http.get(format!("{}/api/v1/tickets/{}", system.booking_base, ids[4])));
    assert_eq!(answer(organizer.send().await.unwrap(), 404).await["code"], "ticket_not_found");
    let customer = system.by(
        admin,
        &["customer"],
        system.http.post(format!("{}/api/v1/admin/events/replay", system.booking_base)),
    );
    assert_eq!(answer(customer.json(&json!({})).send().await.unwrap(), 403).await["code"], "forbidden");
    system.finish().await;
}

#[tokio::test]
async fn until_the_keys_are_loaded_a_token_gets_a_temporary_error() {
    let key = SigningKey::ec();
    let (up, set) = (Arc::new(AtomicBool::new(false)), jwks(&[&key]));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
    let own = Arc::clone(&up);
    let site = axum::Router::new().route(
        "/",
        get(move || {
            let answer = if own.load(Ordering::Relaxed) {
                set.clone().into_response()
            } else {
                StatusCode::NOT_FOUND.into_response()
            };
            async move { answer }
        }),
    );
    let system = System::start_as(None, believing(KeySource::Url(url)), None, |_, _| ()).await;
    system.lifecycle.spawn("site", async move { Ok(axum::serve(listener, site).await?) });
    let token = key.sign(&claims(Uuid::now_v7(), &[]));
    let call = async || {
        system
            .http
            .get(format!("{}/api/v1/reservations", system.booking_base))
            .bearer_auth(&token)
            .send()
            .await
            .unwrap()
    };
    let refused = call().await;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(answer(refused, 503).await["code"], "authentication_unavailable");
    up.store(true, Ordering::Relaxed);
    wait_until("the token is accepted", SOON, async || call().await.status() == 200).await;
}

/// Runs the program with only these settings. Returns whether it succeeded, and its output.
async fn run(program: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(settings.iter().copied()).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(20), command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

#[tokio::test]
async fn a_trial_token_is_accepted_by_services_with_the_same_secret() {
    let secret = "a secret of thirty-two bytes or more";
    let system = System::start_as(None, believing(KeySource::Secret(Secret::from(secret))), None, |_, _| ()).await;
    let program = Path::new(env!("CARGO_BIN_EXE_booking-service"));
    let user = Uuid::now_v7().to_string();
    let mut settings = vec![("JWT_SECRET", secret), ("JWT_ISSUER", ISSUER), ("JWT_AUDIENCE", AUDIENCE)];
    let replay = async |token: &str| {
        let request = system.http.post(format!("{}/api/v1/admin/events/replay", system.booking_base)).json(&json!({}));
        request.bearer_auth(token.trim()).send().await.unwrap().status().as_u16()
    };
    let (_, customer) = run(program, &["token", "--user", &user], &settings).await;
    assert_eq!(replay(&customer).await, 403);
    let arguments = ["token", "--user", &user, "--role", "customer", "--role", "admin", "--minutes", "5"];
    let (_, admin) = run(program, &arguments, &settings).await;
    assert_eq!(replay(&admin).await, 422);
    assert_eq!(replay(&format!("{}x", admin.trim())).await, 401);

    settings.push(("ENVIRONMENT", "production"));
    let (made, said) = run(program, &arguments, &settings).await;
    assert!(!made && said.contains("ENVIRONMENT=production"), "{said}");
    let (made, said) = run(program, &arguments, &settings[1..3]).await;
    assert!(!made && said.contains("JWT_SECRET"), "{said}");
    system.finish().await;
}

#[tokio::test]
async fn production_refuses_trial_settings_and_reports_all_of_them_at_once() {
    let booking = Path::new(env!("CARGO_BIN_EXE_booking-service")).to_owned();
    let by_default = ["AUTH_MODE=header", "DATABASE_URL", "RABBITMQ_URL", "INTERNAL_API_KEY"];
    let short =
        [("ENVIRONMENT", "production"), ("AUTH_MODE", "jwt"), ("JWT_SECRET", "short"), ("INTERNAL_API_KEY", "short")];
    let of_short =
        ["JWT_SECRET has 5 bytes", "JWT_ISSUER", "JWT_AUDIENCE", "INTERNAL_API_KEY has 5 bytes", "DATABASE_URL"];
    for (program, command) in [(event_binary(), "serve"), (booking.clone(), "serve"), (booking, "worker")] {
        let (started, said) = run(&program, &[command], &[("ENVIRONMENT", "production")]).await;
        assert!(!started && by_default.iter().all(|part| said.contains(part)), "{command}: {said}");
        let (started, said) = run(&program, &[command], &short).await;
        assert!(!started && of_short.iter().all(|part| said.contains(part)), "{command}: {said}");
        // With valid settings, the health check gets as far as connecting to a port where no service listens.
        let good = [
            ("ENVIRONMENT", "production"),
            ("AUTH_MODE", "jwt"),
            ("JWT_SECRET", "a secret of thirty-two bytes or more"),
            ("JWT_ISSUER", ISSUER),
            ("JWT_AUDIENCE", AUDIENCE),
            ("INTERNAL_API_KEY", "a key of sixteen bytes or more"),
            ("DATABASE_URL", "postgres://booking_user:8Zk2@localhost:1/booking_db"),
            ("RABBITMQ_URL", "amqp://ticketing:8Zk2@localhost:1/%2f"),
            ("PORT", "1"),
        ];
        let (_, said) = run(&program, &["healthcheck"], &good).await;
        assert!(!said.contains("ENVIRONMENT") && said.contains("http://127.0.0.1:1"), "{said}");
    }
}
