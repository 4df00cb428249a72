#!/usr/bin/env bash
# Writes what sqlx needs to check the SQL statements while compiling: event-service/.sqlx and booking-service/.sqlx. Run
# it after a change of a statement, a migration or a sqlx.toml, and commit what it changes. It needs the servers of
# ./test.sh --only-servers.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/native-servers.sh
source scripts/native-servers.sh

work=$(mktemp -d)
# A database of its own, with nothing but the migrations of one crate.
scratch=sql_data_$$

# run_psql DATABASE OPTION...
run_psql() {
    "$(postgres_bin_dir)/psql" --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname "${TEST_POSTGRES_URL%/*}/$1" "${@:2}"
}

drop_scratch() { PGOPTIONS='-c client_min_messages=warning' run_psql postgres --command "drop database if exists $scratch with (force)"; }

clean_up() {
    local status=$?
    drop_scratch || true
    rm -rf "$work"
    exit "$status"
}

# write_data CRATE: describes all its statements, and puts the result into CRATE/.sqlx.
write_data() {
    local crate=$1 migration
    run_psql postgres --command "create database $scratch"
    for migration in "$crate"/migrations/*.sql; do
        run_psql "$scratch" --single-transaction --file "$migration"
    done
    mkdir "$work/$crate"
    # Only a crate that is compiled has its statements described.
    touch "$crate/src/lib.rs"
    SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$work/$crate DATABASE_URL=${TEST_POSTGRES_URL%/*}/$scratch \
        cargo check --quiet --locked -p "$crate"
    drop_scratch
    rm -rf "$crate/.sqlx"
    mv "$work/$crate" "$crate/.sqlx"
    # What was compiled here must not pass for compiled from the data in the tree.
    touch "$crate/src/lib.rs"
}

if [[ -z ${TEST_POSTGRES_URL:-} ]]; then
    env=${TICKETING_TEST_STATE_DIR:-.local/test}/env.sh
    [[ -e $env ]] || die 'no PostgreSQL to ask: start the test servers with ./test.sh --only-servers'
    # shellcheck source=/dev/null
    source "$env"
fi
trap clean_up EXIT

for crate in event-service booking-service; do
    write_data "$crate"
    done_with "$crate/.sqlx: $(find "$crate/.sqlx" -type f | wc -l) statements"
done
