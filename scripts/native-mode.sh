# shellcheck shell=bash
# Native mode: the whole system as processes of this machine, without containers.

# Every port that the system listens on: the variable that sets it, its default, and the listener.
PORTS=(
    'EVENT_SERVICE_PORT 8000 Event Service'
    'BOOKING_SERVICE_PORT 8001 Booking Service'
    'BOOKING_WORKER_PORT 8002 health and metrics of the booking worker'
    'EVENT_DB_PORT 5433 PostgreSQL of the Event Service'
    'BOOKING_DB_PORT 5434 PostgreSQL of the Booking Service'
    'REDIS_PORT 6379 Redis'
    'RABBITMQ_PORT 5672 RabbitMQ'
    'RABBITMQ_MANAGEMENT_PORT 15672 RabbitMQ management'
)

# The ports of `--observe`. Native mode starts only Prometheus.
readonly OBSERVE_PORTS=(
    'PROMETHEUS_PORT 9090 Prometheus'
    'GRAFANA_PORT 3000 Grafana'
    'JAEGER_PORT 16686 Jaeger'
)

# In the order in which they start. All of them get the signal to stop at once.
readonly SERVICES=(event-service booking-service booking-worker)

# Settings that the services read from the environment. A change of one restarts the service. The pattern does not
# filter: the services receive the whole environment.
readonly SERVICE_SETTINGS='^(AUDIT_|AUTH_|CONNECTIONS_MAX=|CORS_|DATABASE_CONNECTIONS_MAX=|EXPIRY_|INTERNAL_|JWT_|KEEP_ALIVE_|LOG_|MAX_|MOCK_|OTEL_|OUTBOX_|RABBITMQ_(EXCHANGE|QUEUE)|PAYMENT_|RATE_|RECONCILE_|REQUESTS?_|RESERVATION_|RUST_|SEAT_STREAM_|TLS_|TOKIO_|TRUSTED_PROX|ENVIRONMENT=)'

set_default_ports() {
    local entry variable port
    [[ -z ${INTERNAL_PORT:-} ]] || PORTS+=("INTERNAL_PORT $INTERNAL_PORT internal API of the Event Service")
    for entry in "${PORTS[@]}"; do
        read -r variable port _ <<<"$entry"
        printf -v "$variable" '%s' "${!variable:-$port}"
        keep_port "${!variable}"
    done
}

# Prints the process that holds a port. Prints nothing if the port is free or this system holds it.
native_port_holder() {
    if port_taken "$1" && ! port_is_ours "$1"; then
        describe_process "$(port_owner "$1")"
    fi
}

# check_ports HOLDER: checks every port. HOLDER is a function that prints the foreign holder of a port. It reports all
# faults at once, because a user who changes one port often has to change several.
check_ports() {
    local holder=$1 entry variable what port taken_by problems=() seen=' '
    for entry in "${PORTS[@]}"; do
        read -r variable _ what <<<"$entry"
        port=${!variable}
        if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
            problems+=("$variable=$port is not a port number")
        elif [[ $seen == *" $port "* ]]; then
            problems+=("$variable=$port is also the port of another part")
        else
            taken_by=$("$holder" "$port")
            [[ -z $taken_by ]] || problems+=("port $port ($what) is taken by $taken_by
           end that process, or choose another port: $variable=<free port> ./start.sh")
        fi
        seen+="$port "
    done
    ((${#problems[@]} > 0)) || return 0
    for what in "${problems[@]}"; do printf '%serror:%s %s\n' "$RED" "$PLAIN" "$what" >&2; done
    die 'nothing was started'
}

# build_services: builds both programs in one run of Cargo and leaves their folder in BUILT_DIR. Cargo prints a line for
# every crate that it begins, also without a terminal.
build_services() {
    local profile=${TICKETING_BUILD_PROFILE:-start} flags=() folder
    case $profile in
        start | release)
            flags=(--profile "$profile" --bin event-service --bin booking-service)
            folder=$profile
            ;;
        # With the tests, which do not run here: without them the libraries have other features, and Cargo would build
        # again all that ./test.sh has just built.
        dev) flags=(--workspace --tests) folder=debug ;;
        *) die "TICKETING_BUILD_PROFILE is '$profile', but must be start, release or dev" ;;
    esac
    step "Building the services ($profile; the first build takes some minutes)"
    (cd "$REPO_DIR" && cargo build --locked "${flags[@]}")
    BUILT_DIR=${CARGO_TARGET_DIR:-$REPO_DIR/target}
    [[ $BUILT_DIR == /* ]] || BUILT_DIR=$REPO_DIR/$BUILT_DIR
    BUILT_DIR=$BUILT_DIR/$folder
}

# The services run from copies. The next build does not replace these, and the unprivileged user can read them wherever
# the repository is.
copy_programs() {
    local program
    mkdir -p "$DATA_DIR/bin"
    for program in event-service booking-service; do
        if ! cmp --quiet "$BUILT_DIR/$program" "$DATA_DIR/bin/$program"; then
            install -m 755 "$BUILT_DIR/$program" "$DATA_DIR/bin/$program.new"
            mv -f "$DATA_DIR/bin/$program.new" "$DATA_DIR/bin/$program"
        fi
    done
}

# start_service NAME PROGRAM COMMAND SETTING=VALUE...
start_service() {
    local name=$1 program=$DATA_DIR/bin/$2 command=$3 spec
    shift 3
    spec=$({
        sha256sum <"$program"
        printf '%s\n' "$@"
        env | grep -E "$SERVICE_SETTINGS" | sort || true
    } | sha256sum)
    if daemon_is_current "$name" "$spec"; then
        return
    fi
    stop_service "$name"
    # Calls between the parts of the system must not go through a proxy for outside addresses. HOST (some shells set it
    # to the machine's name) and secret files of the caller's environment must not override the settings here.
    start_daemon "$name" "$spec" env -u HOST -u DATABASE_URL_FILE -u RABBITMQ_URL_FILE -u REDIS_URL_FILE "$@" \
        NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}" "$program" "$command"
}

# With a certificate (TLS_CERTIFICATE, see docs/operations/tls.md) the services speak TLS, to each other too.
service_scheme() {
    if [[ -n ${TLS_CERTIFICATE:-}${TLS_CERTIFICATE_FILE:-} ]]; then echo https; else echo http; fi
}

start_services() {
    local rabbitmq=amqp://guest:guest@127.0.0.1:$RABBITMQ_PORT/%2f
    local booking=(
        "DATABASE_URL=postgres://booking_user:booking_password@127.0.0.1:$BOOKING_DB_PORT/booking_db"
        "RABBITMQ_URL=$rabbitmq"
        "REDIS_URL=redis://127.0.0.1:$REDIS_PORT"
        "EVENT_SERVICE_URL=$(service_scheme)://127.0.0.1:${INTERNAL_PORT:-$EVENT_SERVICE_PORT}"
    )
    start_service event-service event-service serve \
        "PORT=$EVENT_SERVICE_PORT" \
        "DATABASE_URL=postgres://postgres:$POSTGRES_PASSWORD@127.0.0.1:$EVENT_DB_PORT/event_service" \
        "RABBITMQ_URL=$rabbitmq" "REDIS_URL=redis://127.0.0.1:$REDIS_PORT"
    start_service booking-service booking-service serve "PORT=$BOOKING_SERVICE_PORT" "${booking[@]}"
    # The worker serves only its health and metrics, which are for this machine.
    start_service booking-worker booking-service worker \
        "PORT=$BOOKING_WORKER_PORT" HOST=127.0.0.1 "${booking[@]}"

    await_service event-service "$EVENT_SERVICE_PORT"
    await_service booking-service "$BOOKING_SERVICE_PORT"
    await_service booking-worker "$BOOKING_WORKER_PORT"
}

await_service() {
    # This request stays on this machine, so the host name of the certificate does not matter.
    await_daemon "$1" 60 http_ok --insecure "$(service_scheme)://127.0.0.1:$2/health/ready"
    done_with "$1 is ready on port $2"
}

# The services finish their requests and end within 20 seconds.
stop_service() { stop_daemon "$1" TERM 25; }

# native_start OBSERVE: yes or no
native_start() {
    [[ $(uname -s) == Linux ]] || die 'native mode needs Linux'
    prepare_state_dir
    lock_state
    [[ $1 == no ]] || PORTS+=("${OBSERVE_PORTS[0]}")
    set_default_ports
    check_ports native_port_holder

    need_basic_tools
    need_servers
    [[ $1 == no ]] || need_prometheus
    need_build_tools
    install_missing
    need_cargo
    build_services

    step 'Starting the servers'
    # Settings for many connections on a small machine. A commit waits until its data is on disk.
    local postgres_settings=(max_connections=450 shared_buffers=128MB fsync=on synchronous_commit=on)
    start_postgres event-db "$EVENT_DB_PORT" "${postgres_settings[@]}"
    start_postgres booking-db "$BOOKING_DB_PORT" "${postgres_settings[@]}"
    ensure_database "$EVENT_DB_PORT" event_service postgres "$POSTGRES_PASSWORD"
    ensure_database "$BOOKING_DB_PORT" booking_db booking_user booking_password
    start_redis "$REDIS_PORT"
    start_rabbitmq "$RABBITMQ_PORT" "$RABBITMQ_MANAGEMENT_PORT"

    step 'Starting the services'
    copy_programs
    start_services
    [[ $1 == no ]] || start_prometheus "$PROMETHEUS_PORT" \
        "event-service=$EVENT_SERVICE_PORT" "booking-service=$BOOKING_SERVICE_PORT" "booking-worker=$BOOKING_WORKER_PORT"
}

native_addresses() {
    step 'The system is up'
    cat <<TEXT
    Event Service     $(service_scheme)://localhost:$EVENT_SERVICE_PORT/docs
    Booking Service   $(service_scheme)://localhost:$BOOKING_SERVICE_PORT/docs
    RabbitMQ          http://localhost:$RABBITMQ_MANAGEMENT_PORT  (guest/guest)
    Event database    postgres://postgres:$POSTGRES_PASSWORD@localhost:$EVENT_DB_PORT/event_service
    Booking database  postgres://booking_user:booking_password@localhost:$BOOKING_DB_PORT/booking_db
    Redis             redis://localhost:$REDIS_PORT
    Logs              $LOG_DIR/
TEXT
    ! daemon_alive prometheus || say "Prometheus        http://localhost:$PROMETHEUS_PORT/alerts  (Grafana and Jaeger need Docker)"
}

native_runs() {
    local name
    for name in "${SERVICES[@]}" rabbitmq redis booking-db event-db prometheus; do
        ! daemon_alive "$name" || return 0
    done
    return 1
}

# native_stop keep|clean
native_stop() {
    local name
    if [[ ! -e $STATE_DIR/$STATE_MARKER ]]; then
        say "Nothing to stop: nothing was started from $STATE_DIR"
        return
    fi
    lock_state
    step 'Stopping'
    # All services get the signal before the script waits for the first.
    for name in "${SERVICES[@]}"; do signal_daemon "$name" TERM; done
    for name in "${SERVICES[@]}"; do await_end "$name" 25; done
    done_with 'services'
    stop_prometheus
    stop_rabbitmq
    stop_redis
    stop_postgres booking-db
    stop_postgres event-db
    done_with 'RabbitMQ, Redis, PostgreSQL'
    if [[ $1 == clean ]]; then
        remove_state
        done_with 'data and logs deleted'
    else
        say 'The data is kept: ./start.sh uses it again, ./stop.sh --clean deletes it.'
    fi
}
