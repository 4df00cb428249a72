//! Tools for the tests of both services: a new database for each test, and waiting for a condition. The submodules have
//! proxies that break connections ([`wires`]) or speak TLS ([`tls`]), random sequences of changes ([`sequences`]), and
//! good and forged tokens ([`login`]).
//!
//! The addresses of the servers come from the environment, which `./test.sh` sets. `./test.sh --only-servers` starts
//! the servers alone, for single runs.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "this module is compiled for tests only, and a test fails by a panic"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "tests read their servers' addresses themselves and spawn outside of a lifecycle"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use serde_json::Value;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, SqlSafeStr};
use tower::ServiceExt;
use utoipa::openapi::OpenApi;
use uuid::Uuid;

use crate::admit::bulkheads::{Classify, RequestClass};
use crate::process::settings::Secret;

pub mod login;
pub mod sequences;
pub mod settings;
pub mod tls;
pub mod wires;

/// The address of a test server, from the environment variable `name`. Panics if it is not set.
#[must_use]
pub fn server(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run ./test.sh, or ./test.sh --only-servers and then `source .local/test/env.sh`")
    })
}

/// The size of a test: the number in the environment variable `name`, for longer runs, or else `usual`.
#[must_use]
pub fn scale(name: &str, usual: usize) -> usize {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// A name that no other test uses.
#[must_use]
pub fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::now_v7().simple())
}

/// A new database with the schema of `migrator`, cloned from a template that is migrated once.
pub async fn database(prefix: &str, migrator: &Migrator) -> Secret {
    let admin: PgConnectOptions = server("TEST_POSTGRES_URL").parse().expect("TEST_POSTGRES_URL");
    let mut connection = admin.connect().await.expect("the test PostgreSQL server answers");
    let fingerprint = migrator
        .iter()
        .flat_map(|migration| migration.checksum.iter())
        .fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    let template = format!("template_{prefix}_{fingerprint:x}");
    // Each test runs in a process of its own. The first one makes the template, and the others wait for it.
    let lock = fingerprint as i64;
    sqlx::query("select pg_advisory_lock($1)").bind(lock).execute(&mut connection).await.expect("lock");
    let made: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(&template)
        .fetch_one(&mut connection)
        .await
        .expect("query");
    if !made {
        let fresh = unique("making");
        create_database(&mut connection, &format!("create database {fresh}")).await;
        let mut database = admin.clone().database(&fresh).connect().await.expect("the new database");
        migrator.run(&mut database).await.expect("migrations");
        database.close().await.expect("close");
        create_database(&mut connection, &format!("alter database {fresh} rename to {template}")).await;
    }
    let name = unique(prefix);
    create_database(&mut connection, &format!("create database {name} template {template}")).await;
    sqlx::query("select pg_advisory_unlock($1)").bind(lock).execute(&mut connection).await.expect("unlock");
    connection.close().await.expect("close");
    Secret::from(admin.database(&name).to_url_lossy().as_str())
}

/// A new database without any schema.
pub async fn empty_database() -> Secret {
    let admin: PgConnectOptions = server("TEST_POSTGRES_URL").parse().expect("TEST_POSTGRES_URL");
    let mut connection = admin.connect().await.expect("the test PostgreSQL server answers");
    let name = unique("empty");
    create_database(&mut connection, &format!("create database {name}")).await;
    Secret::from(admin.database(&name).to_url_lossy().as_str())
}

async fn create_database(connection: &mut PgConnection, sql: &str) {
    connection.execute(AssertSqlSafe(sql.to_owned())).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Waits until `condition` holds; panics with `what` when it does not within `time_max`.
#[track_caller]
pub fn wait_until<F: Future<Output = bool>>(
    what: &str,
    time_max: Duration,
    condition: impl Fn() -> F,
) -> impl Future<Output = Duration> {
    let caller = std::panic::Location::caller();
    async move {
        let begun = Instant::now();
        while !condition().await {
            assert!(begun.elapsed() < time_max, "waited {time_max:?} in vain until {what} ({caller})");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        begun.elapsed()
    }
}

/// Panics if the router and the document do not have the same operations.
///
/// The paths come from the router's debug output, the only place that shows them. The methods come from the `Allow`
/// header of a `405`.
pub async fn assert_document_fits_routes(routes: Router, document: &OpenApi) {
    let shown = format!("{routes:?}");
    let paths: BTreeSet<&str> = shown.split('"').filter(|text| text.starts_with('/')).collect();
    assert!(paths.len() > 5, "the router's debug form does not show its paths any more: {shown}");
    let mut routed = BTreeSet::new();
    for path in paths {
        let sample = path.replace(['{', '}'], "");
        let request = Request::builder().method("PROPFIND").uri(&sample).body(Body::empty()).expect("a request");
        let response = routes.clone().oneshot(request).await.expect("an answer");
        let allowed = response.headers().get(header::ALLOW).and_then(|allow| allow.to_str().ok()).unwrap_or_default();
        let methods = allowed.split(',').filter(|method| !method.is_empty() && *method != "HEAD");
        routed.extend(methods.map(|method| format!("{method} {path}")));
    }
    let described: BTreeSet<String> = operations_of(document).into_keys().collect();
    assert_eq!(routed, described, "routes (left) and document (right) differ");
}

/// Every operation of the document, by method and path.
#[must_use]
pub fn operations_of(document: &OpenApi) -> BTreeMap<String, Value> {
    let document = serde_json::to_value(document).expect("JSON");
    let mut operations = BTreeMap::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            if let Some(operation) = item.get(method.to_lowercase()) {
                operations.insert(format!("{method} {path}"), operation.clone());
            }
        }
    }
    operations
}

/// Calls every operation of clients with a query parameter that it does not have, by `call` of method and path, which
/// returns the answer. Panics unless each is refused with the parameter's name.
pub async fn assert_unknown_parameters_are_refused(
    document: &OpenApi,
    call: impl AsyncFn(&str, String) -> (u16, Value),
) {
    let operations = operations_of(document);
    for operation in operations.keys().filter(|operation| operation.contains(" /api/v1/")) {
        let (method, path) = operation.split_once(' ').expect("a method and a path");
        let steps =
            path.split('/').map(|step| if step.starts_with('{') { Uuid::nil().to_string() } else { step.into() });
        let path = steps.collect::<Vec<String>>().join("/");
        let (status, problem) = call(method, format!("{path}?no_such=1")).await;
        assert_eq!((status, &problem["errors"][0]["parameter"]), (422, &"no_such".into()), "{operation}: {problem}");
    }
}

/// Panics unless every body of clients refuses members that it does not know, at every depth. `foreign` are the paths
/// whose bodies another party defines.
pub fn assert_bodies_are_strict(document: &OpenApi, foreign: &[&str]) {
    let schemas = &serde_json::to_value(document).expect("JSON")["components"]["schemas"];
    let (mut bodies, mut open) = (0, Vec::new());
    for (operation, described) in operations_of(document) {
        let body = &described["requestBody"]["content"]["application/json"]["schema"];
        let path = operation.split(' ').nth(1).unwrap_or_default();
        if body.is_null() || !path.starts_with("/api/v1/") || foreign.contains(&path) {
            continue;
        }
        bodies += 1;
        find_open_objects(&operation, body, schemas, &mut open);
    }
    assert!(bodies > 2, "the document shows only {bodies} bodies");
    assert!(open.is_empty(), "bodies that take unknown members: {open:?}");
}

fn find_open_objects(place: &str, schema: &Value, schemas: &Value, open: &mut Vec<String>) {
    let schema = resolved(schema, schemas);
    if let Some(properties) = schema["properties"].as_object() {
        if schema["additionalProperties"] != false {
            open.push(place.to_owned());
        }
        for (name, property) in properties {
            find_open_objects(&format!("{place}/{name}"), property, schemas, open);
        }
    }
    let forms = ["oneOf", "anyOf", "allOf"].into_iter().filter_map(|forms| schema[forms].as_array()).flatten();
    for inner in forms.chain(schema.get("items")) {
        find_open_objects(place, inner, schemas, open);
    }
}

/// The class of every operation that clients call. Panics if an operation has none, because each must be chosen.
pub fn request_classes_of(document: &OpenApi, classify: Classify) -> BTreeMap<String, RequestClass> {
    let public = operations_of(document).into_keys().filter(|operation| operation.contains(" /api/v1/"));
    let class = |operation: &str| {
        let (method, path) = operation.split_once(' ')?;
        classify(&method.parse().ok()?, path)
    };
    public
        .map(|operation| {
            let class = class(&operation).unwrap_or_else(|| panic!("{operation} has no class"));
            (operation, class)
        })
        .collect()
}

/// Panics unless every length, range and choice of these schemas is also a check constraint of its table. `pairs` are
/// of schema and table.
pub async fn assert_database_has_the_limits_of(document: &OpenApi, database_url: &Secret, pairs: &[(&str, &str)]) {
    let options: PgConnectOptions = database_url.reveal().parse().expect("a database URL");
    let mut connection = options.connect().await.expect("the database answers");
    let schemas = &serde_json::to_value(document).expect("JSON")["components"]["schemas"];
    let mut missing = Vec::new();
    for (schema, table) in pairs {
        let checks: Vec<String> = sqlx::query_scalar(
            "select pg_get_constraintdef(oid) from pg_constraint where conrelid = $1::regclass and contype = 'c'",
        )
        .bind(table)
        .fetch_all(&mut connection)
        .await
        .expect("constraints");
        let checks = checks.join("\n");
        let properties = schemas[schema]["properties"].as_object().unwrap_or_else(|| panic!("no schema {schema}"));
        for (column, rules) in properties {
            let rules = resolved(rules, schemas);
            for wanted in limits_of(column, rules) {
                if !checks.contains(&wanted) {
                    missing.push(format!("{table}: {wanted}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "the document's limits that the database does not have:\n{}", missing.join("\n"));
}

/// Panics unless PostgreSQL says of each checked statement what its file in `folder` (`.sqlx`) says. A statement without
/// a file fails the build by itself; a file whose statement is gone harms nobody.
pub async fn assert_sql_data_is_current(folder: &Path, database_url: &Secret) {
    let options: PgConnectOptions = database_url.reveal().parse().expect("a database URL");
    let mut connection = options.connect().await.expect("the database answers");
    let mut stale = Vec::new();
    let files: Vec<_> =
        std::fs::read_dir(folder).expect("the folder .sqlx").map(|file| file.expect("a file")).collect();
    assert!(files.len() > 20, "{} has only {} statements", folder.display(), files.len());
    for file in files {
        let data: Value = serde_json::from_slice(&std::fs::read(file.path()).expect("a file")).expect("JSON");
        let sql = data["query"].as_str().expect("a statement").to_owned();
        let described = connection.describe(AssertSqlSafe(sql.clone()).into_sql_str()).await;
        let described = described.map(|described| serde_json::to_value(described).expect("JSON"));
        // What may be null is left out: sqlx takes it from the plan, which differs with the statistics of the tables.
        let same = |part: &str| described.as_ref().is_ok_and(|described| described[part] == data["describe"][part]);
        if !same("columns") || !same("parameters") {
            stale.push(format!("{sql}: {described:?}"));
        }
    }
    assert!(stale.is_empty(), "write the data anew with scripts/sql-data.sh; it is stale for:\n{}", stale.join("\n"));
}

fn resolved<'a>(rules: &'a Value, schemas: &'a Value) -> &'a Value {
    let rules = rules["oneOf"].get(0).unwrap_or(rules);
    match rules["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
        Some(name) => &schemas[name],
        None => rules,
    }
}

/// The same limits in PostgreSQL's own notation of check constraints.
fn limits_of(column: &str, rules: &Value) -> Vec<String> {
    let mut limits = Vec::new();
    limits.extend(rules["maxLength"].as_u64().map(|max| format!("(char_length({column}) <= {max})")));
    limits.extend(rules["minLength"].as_u64().map(|min| format!("(char_length({column}) >= {min})")));
    limits.extend(
        rules["enum"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|choice| format!("'{}'::text", choice.as_str().unwrap_or_default())),
    );
    if rules["type"] == "integer" {
        limits.extend(rules["minimum"].as_i64().map(|min| format!("({column} >= {min})")));
        limits.extend(rules["maximum"].as_i64().map(|max| format!("({column} <= {max})")));
    }
    limits
}
