#!/usr/bin/env bash
# Everything that must hold before a change goes in. See ./test.sh --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/libraries.sh
source scripts/libraries.sh

# The state of the servers that --only-servers leaves running. start.sh has its state in .local.
readonly DEVELOPER_STATE_DIR=${TICKETING_TEST_STATE_DIR:-.local/test}

usage() {
    cat <<'HELP'
Usage: ./test.sh [OPTION]

Without an option it runs: format, lints, shellcheck, unused dependencies, supply chain, unit
and integration tests on private servers, then the whole system: start.sh, the tutorial, test_integration.sh,
generated clients and requests (scripts/interface), dashboard and alerts (scripts/observability),
stop.sh. It installs missing packages, uses free ports and its own folder, and stops everything at
the end. It can run while another system runs on this machine.

  --fast           leaves out the whole system
  --chaos TIME [--seed NUMBER]
                   runs only the chaos test, for a time such as 10m or 90s: it kills, freezes and
                   disconnects processes while buyers buy, then checks every promise. The seed
                   decides which faults come when. Without a seed the test chooses and prints one.
  --only-servers   starts PostgreSQL, Redis and RabbitMQ for tests, leaves them running, and
                   prints how to run single tests on them
  --stop-servers   stops those servers and deletes their data
  --help           prints this text
HELP
}

die_of_usage() {
    usage >&2
    exit 2
}

# start_test_servers: starts the servers on free ports and exports the variables that the tests read.
start_test_servers() {
    local postgres_port redis_port rabbitmq_port management_port
    if [[ -e $STATE_DIR/env.sh ]]; then
        # Servers that still run keep their ports.
        # shellcheck source=/dev/null
        source "$STATE_DIR/env.sh"
        postgres_port=$TEST_POSTGRES_PORT redis_port=$TEST_REDIS_PORT
        rabbitmq_port=$TEST_RABBITMQ_PORT management_port=$TEST_RABBITMQ_MANAGEMENT_PORT
    else
        pick_port postgres_port
        pick_port redis_port
        pick_port rabbitmq_port
        pick_port management_port
    fi
    cat >"$STATE_DIR/env.sh" <<ENV
TEST_POSTGRES_PORT=$postgres_port
TEST_REDIS_PORT=$redis_port
TEST_RABBITMQ_PORT=$rabbitmq_port
TEST_RABBITMQ_MANAGEMENT_PORT=$management_port
export TEST_POSTGRES_URL=postgres://postgres:$POSTGRES_PASSWORD@127.0.0.1:$postgres_port/postgres
export TEST_REDIS_URL=redis://127.0.0.1:$redis_port
export TEST_RABBITMQ_URL=amqp://guest:guest@127.0.0.1:$rabbitmq_port/%2f
export TEST_RABBITMQ_MANAGEMENT_URL=http://127.0.0.1:$management_port
ENV
    # Tests create and drop many databases, and their data may be lost in a crash. Without fsync that takes a fraction
    # of the time. Commits still wait, as in production.
    start_postgres postgres "$postgres_port" fsync=off full_page_writes=off max_connections=500 \
        shared_buffers=256MB
    start_redis "$redis_port"
    start_rabbitmq "$rabbitmq_port" "$management_port"
    # shellcheck source=/dev/null
    source "$STATE_DIR/env.sh"
}

stop_test_servers() {
    stop_rabbitmq
    stop_redis
    stop_postgres postgres
    remove_state
}

install_packages() {
    need_basic_tools
    need_servers
    need_build_tools
    need_python
    need_prometheus
    need shellcheck shellcheck shellcheck
    install_missing
}

# --- stages -----------------------------------------------------------------------------

STAGE=''

# stage TITLE COMMAND...
stage() {
    local started=$SECONDS
    STAGE=$1
    shift
    printf '\n'
    step "$STAGE"
    "$@"
    done_with "$STAGE: $((SECONDS - started)) s"
    STAGE=''
}

check_scripts() {
    local scripts
    mapfile -t scripts < <(find . -name '*.sh' -not -path './target/*' -not -path './.local/*' | sort)
    shellcheck --external-sources "${scripts[@]}" .ci/run .ci/compose
    python3 scripts/check-docs.py
}

# Installs cargo-deny and cargo-shear into the work folder, unless the machine has them.
install_supply_chain_tools() {
    SUPPLY_CHAIN_PATH=$PATH:$WORK_DIR/supply-chain/bin
    if cargo deny --version >/dev/null 2>&1 && cargo shear --version >/dev/null 2>&1; then
        return
    fi
    if python3 -m venv "$WORK_DIR/supply-chain"; then
        "$WORK_DIR/supply-chain/bin/pip" install --quiet --disable-pip-version-check --require-hashes \
            --requirement scripts/supply-chain/requirements.txt || true
    fi
}

# Dependencies: each is used, deny.toml allows it, and the bill of materials has the right form.
check_supply_chain() {
    install_supply_chain_tools
    if PATH=$SUPPLY_CHAIN_PATH cargo shear --version 2>/dev/null; then
        PATH=$SUPPLY_CHAIN_PATH cargo shear --locked
    else
        say 'cargo-shear: NOT RUN, because it could not be installed: cargo install --locked cargo-shear'
    fi
    if PATH=$SUPPLY_CHAIN_PATH cargo deny --version 2>/dev/null; then
        # A build fetches the crates of its own platform; cargo-deny reads those of every platform.
        cargo fetch --locked
        PATH=$SUPPLY_CHAIN_PATH cargo deny --offline --log-level error check bans licenses sources
        say 'advisories: NOT RUN here, because they need a database from the network: cargo deny check advisories'
    else
        say 'cargo-deny: NOT RUN, because it could not be installed: cargo install --locked cargo-deny'
    fi
    scripts/sbom.sh >"$WORK_DIR/sbom.json"
    jq --exit-status '
        (.components | map(.["bom-ref"])) as $parts
        | .bomFormat == "CycloneDX" and .specVersion == "1.6" and (.serialNumber | startswith("urn:uuid:"))
        and ($parts | length > 100 and length == (unique | length))
        and (["event-service", "booking-service"] - [.components[].name] == [])
        and all(.components[]; .purl and .version and .licenses[0].expression)
        and ([.dependencies[].dependsOn[]] - $parts == [])' "$WORK_DIR/sbom.json" >/dev/null ||
        die 'scripts/sbom.sh made a bill of materials in a wrong form'
}

# Once with the tests, and once as users build the services, without the features that only tests have.
check_lints() {
    cargo clippy --workspace --all-targets --locked -- -D warnings
    cargo clippy --workspace --locked -- -D warnings
}

# True if a doc comment has a code block that rustdoc compiles: one that begins with ``` and does not name another
# language.
has_doc_examples() {
    git ls-files '*.rs' | xargs awk '
        FNR == 1 { inside = 0 }
        /^ *\/\/[\/!] *```/ {
            if (!inside && !/``` *(text|json|sql|sh|bash|toml)/) found = 1
            inside = !inside
        }
        END { exit !found }'
}

run_tests() {
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --workspace --locked
        # nextest leaves out only the examples in the documentation. Without examples rustdoc would read all crates in
        # vain.
        ! has_doc_examples || cargo test --workspace --locked --doc
    else
        cargo test --workspace --locked
    fi
}

integration_test_or_logs() {
    ./test_integration.sh && return
    for log in event-service booking-service booking-worker; do
        printf '\n--- last lines of %s.log\n' "$log"
        tail -n 40 "$WORK_DIR/system/logs/$log.log"
    done
    exit 1
}

# In a subshell, so that the ports apply only to these commands.
test_whole_system() (
    for variable in EVENT_SERVICE_PORT BOOKING_SERVICE_PORT BOOKING_WORKER_PORT EVENT_DB_PORT \
        BOOKING_DB_PORT REDIS_PORT RABBITMQ_PORT RABBITMQ_MANAGEMENT_PORT PROMETHEUS_PORT; do
        pick_port "$variable"
        export "${variable?}"
    done
    # The user may have these set for another system.
    unset AUTH_MODE INTERNAL_API_KEY INTERNAL_PORT TICKETING_TOKEN TICKETING_TOKEN_COMMAND
    unset EVENT_SERVICE_URL BOOKING_SERVICE_URL BOOKING_WORKER_URL RABBITMQ_MANAGEMENT_URL
    unset TLS_CERTIFICATE TLS_CERTIFICATE_FILE TLS_PRIVATE_KEY TLS_PRIVATE_KEY_FILE TLS_CA_FILE
    export TICKETING_STATE_DIR=$WORK_DIR/system TICKETING_BUILD_PROFILE=dev
    # A hold of six seconds, so that the test can see one expire.
    export RESERVATION_TIMEOUT_MINUTES=0.1 EXPIRY_WORKER_INTERVAL_SECONDS=1 RECONCILE_INTERVAL_SECONDS=1
    export AUDIT_INTERVAL_MINUTES=0.05 OBSERVE_INTERVAL_SECONDS=1

    ./start.sh --native --demo --observe
    scripts/tutorial.sh
    integration_test_or_logs
    scripts/observability/check.sh "http://127.0.0.1:$PROMETHEUS_PORT" "http://127.0.0.1:$EVENT_SERVICE_PORT" "http://127.0.0.1:$BOOKING_SERVICE_PORT"
    # The same and the other checks with authentication. This is a test system, so the secret may be public.
    export AUTH_MODE=jwt JWT_SECRET=known-to-everybody-who-reads-the-tests JWT_ISSUER=test.sh JWT_AUDIENCE=ticketing
    export INTERNAL_API_KEY=known-to-everybody-too
    # One user sends hundreds of generated requests a second and books every free seat.
    export RATE_LIMIT_ENABLED=false MAX_OPEN_RESERVATIONS_PER_USER=0 MAX_SEATS_PER_USER_AND_SESSION=0
    ./start.sh --native
    integration_test_or_logs
    # With a fixed seed a failing run fails again. For more requests: scripts/interface/run.sh --examples 200.
    scripts/interface/run.sh "http://127.0.0.1:$EVENT_SERVICE_PORT" "http://127.0.0.1:$BOOKING_SERVICE_PORT" \
        --work-dir "$WORK_DIR/interface" --examples 10 --seed 1 --token-command "$WORK_DIR/system/data/bin/booking-service token"
    ./stop.sh --native --clean
    [[ ! -e $WORK_DIR/system ]] || die "stop.sh --clean left something in $WORK_DIR/system"
)

# After every run, also a failed one, nothing keeps running and nothing stays on the disk.
clean_up() {
    local status=$?
    # A second Ctrl-C must not interrupt this.
    trap '' INT TERM HUP
    [[ -z $STAGE ]] || printf '\n%sfailed:%s %s\n' "$RED" "$PLAIN" "$STAGE"
    if [[ -n $WORK_DIR ]]; then
        if [[ -e $WORK_DIR/system ]]; then
            TICKETING_STATE_DIR=$WORK_DIR/system ./stop.sh --native --clean || true
        fi
        use_state_dir "$WORK_DIR/servers"
        (stop_test_servers) || true
        rm -rf "$WORK_DIR"
    fi
    printf '\ntotal time: %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
    exit "$status"
}

trap_exits() {
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
}

start_private_servers() {
    WORK_DIR=$(mktemp -d)
    # If root runs this, the servers run as another user, who must be able to enter the folder.
    chmod 711 "$WORK_DIR"
    use_state_dir "$WORK_DIR/servers"
    prepare_state_dir
    stage 'Servers for the tests' start_test_servers
}

# run_chaos TIME [--seed NUMBER]
run_chaos() {
    [[ ${1:-} =~ ^([1-9][0-9]{0,3})([smh])$ ]] || die_of_usage
    local -A unit=([s]=1 [m]=60 [h]=3600)
    export CHAOS_SECONDS=$((BASH_REMATCH[1] * unit[${BASH_REMATCH[2]}])) CHAOS_SEED=$RANDOM$RANDOM
    if (($# > 1)); then
        [[ $# == 3 && $2 == --seed && $3 =~ ^[0-9]{1,15}$ ]] || die_of_usage
        CHAOS_SEED=$3
    fi
    trap_exits
    install_packages
    need_cargo
    start_private_servers
    stage "Chaos for $CHAOS_SECONDS s with seed $CHAOS_SEED" \
        cargo test --workspace --locked --test it chaos:: -- --nocapture --test-threads 1
}

run_everything() {
    trap_exits
    install_packages
    need_cargo
    need_cargo_components
    # CI builds once. Data for incremental builds would only cost time there.
    [[ -z ${CI:-} ]] || export CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0}
    stage 'Format' cargo fmt --all --check
    stage 'Lints' check_lints
    stage 'Shell scripts and documents' check_scripts
    start_private_servers
    stage 'Supply chain' check_supply_chain
    stage 'Unit and integration tests' run_tests
    stage 'Stopping the servers' stop_test_servers
    if [[ $1 == all ]]; then
        stage 'The whole system' test_whole_system
    fi
    printf '\n%sall passed%s\n' "$GREEN" "$PLAIN"
}

WORK_DIR=''
case ${1:-} in
    '') run_everything all ;;
    --fast) run_everything fast ;;
    --chaos) run_chaos "${@:2}" ;;
    --only-servers)
        install_packages
        use_state_dir "$DEVELOPER_STATE_DIR"
        prepare_state_dir
        lock_state
        step 'Servers for tests'
        start_test_servers
        say "To run single tests:  source $STATE_DIR/env.sh && cargo test NAME"
        say 'To stop the servers:  ./test.sh --stop-servers'
        ;;
    --stop-servers)
        use_state_dir "$DEVELOPER_STATE_DIR"
        stop_test_servers
        done_with 'stopped, data deleted'
        ;;
    --help | -h) usage ;;
    *) die_of_usage ;;
esac
