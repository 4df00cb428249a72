# shellcheck shell=bash
# Private PostgreSQL, Redis and RabbitMQ servers. All their files are under DATA_DIR, they listen only on 127.0.0.1, and
# they do not touch servers that the operating system runs.

as_run_user() { (cd / && "${RUN_AS[@]}" "$@"); }

# --- PostgreSQL -------------------------------------------------------------------------

readonly POSTGRES_OLDEST=15
readonly POSTGRES_PASSWORD=postgres

# Prints the folder with the programs of one major version; by default the newest that is installed.
postgres_bin_dir() {
    local wanted=${1:-} version dir
    while read -r version dir; do
        if [[ $version == "${wanted:-$version}" ]] && ((version >= POSTGRES_OLDEST)); then
            printf '%s' "$dir"
            return
        fi
    done < <(installed_postgres | sort -rn)
    return 1
}

# Prints one line for each installation: major version and folder. Debian installs several versions outside the PATH.
# Most other systems have one in the PATH, perhaps as links.
installed_postgres() {
    local dir program in_path
    in_path=$(readlink -f "$(command -v postgres || true)" || true)
    for dir in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin "${in_path%/*}"; do
        for program in postgres initdb pg_isready psql; do
            [[ -x $dir/$program ]] || continue 2
        done
        printf '%s %s\n' "$("$dir/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')" "$dir"
    done
}

# The Event Service's schema needs btree_gist, which some systems put into a separate package.
postgres_has_contrib() {
    local share
    # pg_config may be missing, because Debian has it in the package of the client.
    share=$("$(postgres_bin_dir)/pg_config" --sharedir 2>/dev/null) || return 1
    [[ -e $share/extension/btree_gist.control ]]
}

# start_postgres NAME PORT [SETTING=VALUE...]
start_postgres() {
    local name=$1 port=$2 setting version='' bin data
    shift 2
    prepare_data_dir "$name"
    data=$DATA_DIR/$name/pgdata
    if [[ -e $data/PG_VERSION ]]; then
        version=$(<"$data/PG_VERSION")
    fi
    bin=$(postgres_bin_dir "$version") ||
        die "the data in $data is of PostgreSQL $version, which is not installed.
       Install that version, or delete the data with ./stop.sh --clean"

    local command=("$bin/postgres" -D "$data")
    for setting in "port=$port" listen_addresses=127.0.0.1 unix_socket_directories= \
        'log_line_prefix=%m [%p] ' "$@"; do
        command+=(-c "$setting")
    done
    local spec="${command[*]}"
    if daemon_is_current "$name" "$spec"; then
        say "$name already runs on port $port"
        return
    fi
    stop_postgres "$name"

    if [[ -z $version ]]; then
        # initdb writes to a temporary folder that is renamed at the end, so that an interrupted run leaves no half
        # database.
        as_run_user rm -rf "$data.new"
        as_run_user tee "$DATA_DIR/$name/password" <<<"$POSTGRES_PASSWORD" >/dev/null
        as_run_user "$bin/initdb" --pgdata="$data.new" --username=postgres --encoding=UTF8 \
            --locale=C.UTF-8 --auth=scram-sha-256 --pwfile="$DATA_DIR/$name/password" \
            --data-checksums >"$LOG_DIR/$name.initdb.log" 2>&1 || {
            cat "$LOG_DIR/$name.initdb.log" >&2
            die "$name: initdb failed"
        }
        as_run_user rm "$DATA_DIR/$name/password"
        as_run_user mv "$data.new" "$data"
    fi
    forget_dead_postgres "$data"
    start_daemon "$name" "$spec" "${command[@]}"
    await_daemon "$name" 60 "$bin/pg_isready" --quiet --host 127.0.0.1 --port "$port"
    done_with "$name: PostgreSQL on port $port"
}

# A killed server leaves a lock file with its pid. PostgreSQL refuses to start while a process of the same user has that
# pid; after a reboot that can be our Redis. Processes of the old server have the data folder as working folder and soon
# end.
forget_dead_postgres() {
    wait_until 20 nobody_works_in "$1" ||
        die "processes of an earlier PostgreSQL still use $1"
    as_run_user rm -f "$1/postmaster.pid"
}

nobody_works_in() { [[ -z $(find /proc/[0-9]*/cwd -maxdepth 0 -lname "$1" 2>/dev/null) ]]; }

# SIGINT is PostgreSQL's "fast" stop: it ends sessions and writes everything to disk.
stop_postgres() { stop_daemon "$1" INT 60; }

postgres_query() {
    local port=$1 sql=$2
    PGPASSWORD=$POSTGRES_PASSWORD "$(postgres_bin_dir)/psql" --no-psqlrc --quiet --tuples-only --no-align \
        --set ON_ERROR_STOP=1 "host=127.0.0.1 port=$port user=postgres dbname=postgres sslmode=disable" \
        --command "$sql" </dev/null
}

# ensure_database PORT DATABASE OWNER PASSWORD
ensure_database() {
    local port=$1 database=$2 owner=$3 password=$4
    if [[ -z $(postgres_query "$port" "select 1 from pg_roles where rolname = '$owner'") ]]; then
        postgres_query "$port" "create role $owner login password '$password'"
    fi
    if [[ -z $(postgres_query "$port" "select 1 from pg_database where datname = '$database'") ]]; then
        postgres_query "$port" "create database $database owner $owner"
    fi
}

# --- Redis ------------------------------------------------------------------------------

start_redis() {
    local name=redis port=$1
    prepare_data_dir "$name"
    # noeviction: seat locks must not vanish when memory is short. An error is better, because the Booking Service
    # handles it. A crash may lose the last second of locks; that is safe, because PostgreSQL decides about every seat.
    local command=(redis-server --bind 127.0.0.1 --port "$port" --dir "$DATA_DIR/$name"
        --maxmemory-policy noeviction --appendonly yes --appendfsync everysec --save ''
        --daemonize no)
    local spec="${command[*]}"
    if daemon_is_current "$name" "$spec"; then
        say "redis already runs on port $port"
        return
    fi
    stop_redis
    start_daemon "$name" "$spec" "${command[@]}"
    await_daemon "$name" 60 redis_answers "$port"
    done_with "redis: Redis on port $port"
}

redis_answers() { [[ $(redis-cli -h 127.0.0.1 -p "$1" ping 2>/dev/null) == PONG ]]; }

stop_redis() { stop_daemon redis TERM 30; }

# --- RabbitMQ ---------------------------------------------------------------------------

# Not the command in the PATH first: on Debian that one requires the system's own user and folders.
rabbitmq_program() {
    local program
    for program in /usr/lib/rabbitmq/bin/rabbitmq-server "$(command -v rabbitmq-server || true)"; do
        if [[ -x $program ]]; then
            printf '%s' "$program"
            return
        fi
    done
    return 1
}

rabbitmq_config() {
    local port=$1 management_port=$2
    # Without a name RabbitMQ makes one with a DNS query.
    cat <<CONFIG
listeners.tcp.1 = 127.0.0.1:$port
management.tcp.ip = 127.0.0.1
management.tcp.port = $management_port
cluster_name = ticketing
log.file = false
log.console = true
log.console.level = info
log.console.use_colors = off
CONFIG
}

start_rabbitmq() {
    local name=rabbitmq port=$1 management_port=$2
    local home=$DATA_DIR/$name config spec
    config=$(rabbitmq_config "$port" "$management_port")
    spec="$(rabbitmq_program) $config"
    if daemon_is_current "$name" "$spec" && daemon_alive epmd; then
        say "rabbitmq already runs on port $port"
        return
    fi
    stop_rabbitmq
    prepare_data_dir "$name"
    as_run_user tee "$home/rabbitmq.conf" <<<"$config" >/dev/null
    as_run_user tee "$home/enabled_plugins" <<<'[rabbitmq_management].' >/dev/null
    # Without this Erlang asks the system's resolver, which may wait for DNS.
    as_run_user tee "$home/inetrc" <<<'{lookup, [file]}. {host, {127,0,0,1}, ["localhost"]}.' >/dev/null
    if [[ ! -e $home/.erlang.cookie ]]; then
        tr -d - </proc/sys/kernel/random/uuid | as_run_user tee "$home/.erlang.cookie" >/dev/null
        as_run_user chmod 400 "$home/.erlang.cookie"
    fi

    # All Erlang programs of a machine usually share one port mapper, which outlives them. With a private one any number
    # of brokers can run on one machine.
    local epmd_port dist_port
    pick_port epmd_port
    pick_port dist_port
    start_daemon epmd "$epmd_port" epmd -port "$epmd_port" -address 127.0.0.1
    await_daemon epmd 20 port_taken "$epmd_port"

    # The environment is empty, because the broker obeys every RABBITMQ_... variable and the services have settings with
    # such names. With ALLOW_INPUT the start script replaces itself by the Erlang machine, so that we have its pid.
    start_daemon "$name" "$spec" env -i \
        PATH="$PATH" LANG=C.UTF-8 HOME="$home" \
        ERL_EPMD_PORT="$epmd_port" ERL_EPMD_ADDRESS=127.0.0.1 ERL_INETRC="$home/inetrc" \
        RABBITMQ_NODENAME=ticketing@localhost \
        RABBITMQ_DIST_PORT="$dist_port" \
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}' \
        RABBITMQ_ALLOW_INPUT=1 RABBITMQ_SERVER_START_ARGS='-noinput +B i' \
        RABBITMQ_CONF_ENV_FILE=/dev/null \
        RABBITMQ_CONFIG_FILE="$home/rabbitmq.conf" \
        RABBITMQ_ADVANCED_CONFIG_FILE="$home/advanced.config" \
        RABBITMQ_ENABLED_PLUGINS_FILE="$home/enabled_plugins" \
        RABBITMQ_MNESIA_BASE="$home/mnesia" \
        RABBITMQ_LOG_BASE="$home/log" \
        RABBITMQ_GENERATED_CONFIG_DIR="$home/config" \
        "$(rabbitmq_program)"
    await_daemon "$name" 120 rabbitmq_answers "$port" "$management_port"
    done_with "rabbitmq: RabbitMQ on port $port, management on port $management_port"
}

rabbitmq_answers() {
    http_ok --user guest:guest "http://127.0.0.1:$2/api/health/checks/port-listener/$1"
}

stop_rabbitmq() {
    stop_daemon rabbitmq TERM 60
    stop_daemon epmd TERM 10
}

# --- Prometheus -------------------------------------------------------------------------

# start_prometheus PORT JOB=PORT...: uses the jobs and alert rules of the containers, with addresses of this machine.
start_prometheus() {
    local name=prometheus port=$1 home=$DATA_DIR/prometheus config job
    shift
    config=$(sed -E "s/^( *(scrape|evaluation)_interval:).*/\\1 ${OBSERVE_INTERVAL_SECONDS:-5}s/" "$REPO_DIR/deploy/observability/prometheus.yml")
    for job in "$@"; do
        config=$(sed -E "s/dns_sd_configs: .*names: \\[${job%%=*}\\].*/static_configs: [{targets: ['127.0.0.1:${job#*=}']}]/" <<<"$config")
    done
    local command=(prometheus "--config.file=$home/prometheus.yml" "--storage.tsdb.path=$home/tsdb"
        --storage.tsdb.retention.time=15d "--web.listen-address=127.0.0.1:$port" --log.level=warn)
    local spec
    spec="${command[*]} $config $(sha256sum <"$REPO_DIR/deploy/observability/alerts.yml")"
    if daemon_is_current "$name" "$spec"; then
        say "prometheus already runs on port $port"
        return
    fi
    stop_prometheus
    prepare_data_dir "$name"
    as_run_user tee "$home/prometheus.yml" <<<"$config" >/dev/null
    as_run_user tee "$home/alerts.yml" <"$REPO_DIR/deploy/observability/alerts.yml" >/dev/null
    start_daemon "$name" "$spec" "${command[@]}"
    await_daemon "$name" 60 http_ok "http://127.0.0.1:$port/-/ready"
    done_with "prometheus: Prometheus on port $port"
}

stop_prometheus() { stop_daemon prometheus TERM 30; }
