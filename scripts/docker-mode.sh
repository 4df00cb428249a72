# shellcheck shell=bash
# Docker mode: the whole system in containers, with docker-compose.yml. It uses the ports of native-mode.sh, so source
# that file first. The caller must have changed to the top folder, where Compose finds its file.

# In the order in which they start.
CONTAINERS=(event-service-db booking-service-db ticketing-redis ticketing-rabbitmq
    event-service booking-service booking-worker)
readonly VOLUMES=(ticketing_event_db ticketing_booking_db ticketing_redis ticketing_rabbitmq ticketing_prometheus)
readonly NETWORK=ticketing_network

# --- the engine -------------------------------------------------------------------------

# engine_answers: true if the Docker engine answers within 20 seconds; otherwise ENGINE_PROBLEM has the reason.
ENGINE_PROBLEM=''
engine_answers() {
    local output
    ENGINE_PROBLEM='docker is not installed'
    command -v docker >/dev/null 2>&1 || return 1
    if output=$(timeout 20 docker version --format '{{.Server.Version}}' 2>&1); then
        ENGINE_PROBLEM=''
        return
    fi
    case $output in
        *'permission denied'*) ENGINE_PROBLEM='this user may not use the Docker engine' ;;
        *) ENGINE_PROBLEM='the Docker engine does not run' ;;
    esac
    return 1
}

need_engine() {
    engine_answers && return
    case $ENGINE_PROBLEM in
        *installed) die "$ENGINE_PROBLEM. Install it from https://docs.docker.com/get-docker, or run without it: ./start.sh --native" ;;
        *may\ not*) die "$ENGINE_PROBLEM. Use sudo, or join the group docker and log in again" ;;
        *) die "$ENGINE_PROBLEM. Start it (systemctl start docker, or Docker Desktop), or run without it: ./start.sh --native" ;;
    esac
}

# Compose 2 is a plugin of docker. Compose 1 is a separate program.
COMPOSE=()
find_compose() {
    if docker compose version >/dev/null 2>&1; then
        COMPOSE=(docker compose)
    elif command -v docker-compose >/dev/null 2>&1; then
        COMPOSE=(docker-compose)
    else
        return 1
    fi
}

need_compose() {
    find_compose || die 'Compose is not installed. Install the package docker-compose-plugin or docker-compose, or run without it: ./start.sh --native'
    # Compose 2 builds with this plugin and fails without it. The classic builder needs no plugin.
    if [[ -z ${DOCKER_BUILDKIT:-} ]] && ! docker buildx version >/dev/null 2>&1; then
        export DOCKER_BUILDKIT=0
    fi
}

# Compose 2 refuses a network of this name that another program made, unless the file declares it external.
find_network() {
    local made_by_compose
    made_by_compose=$(docker network inspect --format '{{index .Labels "com.docker.compose.network"}}' "$NETWORK" 2>/dev/null) || return 0
    [[ -n $made_by_compose ]] || export TICKETING_NETWORK_EXTERNAL=true
}

# Two runs at once would create the same containers twice. The lock is on the open compose file.
lock_compose() {
    exec {COMPOSE_LOCK}<"$REPO_DIR/docker-compose.yml"
    flock --nonblock "$COMPOSE_LOCK" || die 'another start or stop is running in this folder'
}

# --- what exists ----------------------------------------------------------------------

# Prints the folder from which Compose started a container.
started_from() {
    local folder
    folder=$(docker inspect --format '{{index .Config.Labels "com.docker.compose.project.working_dir"}}' "$1" 2>/dev/null) || return 1
    [[ -z $folder ]] || readlink -m "$folder"
}

our_containers() {
    local container
    for container in $(docker ps --all --quiet --filter label=com.docker.compose.project); do
        [[ $(started_from "$container") != "$REPO_DIR" ]] || printf '%s\n' "$container"
    done
}

docker_system_exists() { [[ -n $(our_containers) ]]; }

docker_data_exists() { docker volume inspect "${VOLUMES[0]}" >/dev/null 2>&1; }

# The names are fixed, so a foreign container with one of them prevents the start.
check_names() {
    local name folder problems=()
    for name in "${CONTAINERS[@]}"; do
        folder=$(started_from "$name") || continue
        if [[ -z $folder ]]; then
            problems+=("another container has the name $name: docker rm --force $name")
        elif [[ $folder != "$REPO_DIR" ]]; then
            problems+=("container $name was started from $folder: (cd $folder && ${COMPOSE[*]} down)")
        fi
    done
    ((${#problems[@]} > 0)) || return 0
    for name in "${problems[@]}"; do printf '%serror:%s %s\n' "$RED" "$PLAIN" "$name" >&2; done
    die 'nothing was started'
}

# Prints the container or process that holds a port. Prints nothing if the port is free or this system holds it.
docker_port_holder() {
    local container
    container=$(docker ps --quiet --filter "publish=$1" | head -n 1)
    if [[ -z $container ]]; then
        ! port_taken "$1" || describe_process "$(port_owner "$1")"
    elif [[ $(started_from "$container") != "$REPO_DIR" ]]; then
        printf 'container %s' "$(docker inspect --format '{{slice .Name 1}}' "$container")"
    fi
}

# Compose reads .env by itself. This script needs its ports too. The environment overrides the file, as in Compose.
read_ports_from_env_file() {
    local entry variable value
    [[ -f $REPO_DIR/.env ]] || return 0
    for entry in "${PORTS[@]}"; do
        read -r variable _ <<<"$entry"
        [[ -z ${!variable:-} ]] || continue
        value=$(sed -n "s/^ *$variable=[\"']\{0,1\}\([^\"'# ]*\).*/\1/p" "$REPO_DIR/.env" | tail -n 1 | tr -d '\r')
        [[ -z $value ]] || printf -v "$variable" '%s' "$value"
    done
}

# --- starting ---------------------------------------------------------------------------

# Pulls before anything starts, so that the error for a missing image is not lost among the messages of seven
# containers.
pull_images() {
    local config image images output
    config=$("${COMPOSE[@]}" config) || die "docker-compose.yml or .env has a fault: see the message of ${COMPOSE[*]} above"
    # Older versions of Compose also show the services of profiles that are not selected.
    mapfile -t images < <(awk -v with_profiles="${COMPOSE_PROFILES:-}" '
        function service_ends() { if (image != "" && (!has_profile || with_profiles != "")) print image; image = ""; has_profile = 0 }
        /^(  )?[^ ]/ { service_ends() }
        /^    profiles:/ { has_profile = 1 }
        /^    image:/ && $2 !~ /^ticketing\// { image = $2 }
        END { service_ends() }' <<<"$config" | sort -u)
    for image in "${images[@]}"; do
        ! docker image inspect "$image" >/dev/null 2>&1 || continue
        say "pulling $image"
        # The largest image has 250 MB. A slower connection can pull it by hand.
        output=$(timeout 1800 docker pull --quiet "$image" 2>&1) ||
            die "image $image can't be pulled: ${output##*$'\n'}
       Try it by hand (docker pull $image). It must reach the registry, perhaps through a proxy or after docker login"
    done
}

build_images() {
    local profile=${TICKETING_BUILD_PROFILE:-release} log
    case $profile in
        start | release | dev) ;;
        *) die "TICKETING_BUILD_PROFILE is '$profile', but must be start, release or dev" ;;
    esac
    step "Building the images ($profile; the first build takes some minutes)"
    log=$(mktemp)
    if ! "${COMPOSE[@]}" build 2>&1 | tee "$log"; then
        if grep -qiE 'failed to (resolve|do request|authorize)|pull access denied|manifest (for|unknown)|toomanyrequests|no such host|i/o timeout|could not resolve host' "$log"; then
            rm -f "$log"
            die 'an image or a package that the build needs could not be fetched (see above): check the network, the proxy, and docker login'
        fi
        rm -f "$log"
        die 'the images could not be built: see the messages of the build above'
    fi
    rm -f "$log"
}

# Prints the state of a container and its health if it has a health check: "running healthy".
container_state() {
    local state
    # docker prints an empty line for a missing container.
    state=$(docker inspect --format '{{.State.Status}}{{if .State.Health}} {{.State.Health.Status}}{{end}}' "$1" 2>/dev/null) || state=missing
    printf '%s' "$state"
}

# Prints the last log lines and the last health checks of an unhealthy container.
show_container() {
    printf '\n--- %s is %s; last lines of docker logs %s\n' "$1" "$(container_state "$1")" "$1" >&2
    docker logs --tail 25 "$1" >&2 2>&1 || true
    docker inspect --format '{{if .State.Health}}{{range .State.Health.Log}}{{.Output}}{{end}}{{end}}' "$1" 2>/dev/null |
        grep -v '^$' | tail -n 3 | sed 's/^/health check: /' >&2 || true
    printf -- '---\n' >&2
}

# give_up REASON: prints the logs of each container that exists and is not healthy, then ends with REASON.
give_up() {
    local name state
    for name in "${CONTAINERS[@]}"; do
        state=$(container_state "$name")
        case $state in
            missing | created | 'running healthy' | 'running starting') ;;
            *) show_container "$name" ;;
        esac
    done
    die "$1"
}

# await_container NAME SECONDS
await_container() {
    local name=$1 deadline=$((SECONDS + $2)) state
    while true; do
        state=$(container_state "$name")
        [[ $state != 'running healthy' ]] || break
        case $state in
            *unhealthy | missing) give_up "container $name is $state" ;;
        esac
        # The engine restarts a container that dies. One that dies again and again runs into this limit.
        ((SECONDS < deadline)) || give_up "container $name was not healthy within $2 seconds, but $state"
        sleep 0.5
    done
}

# Compose ignores these containers unless their profile is selected.
observe_containers() {
    export COMPOSE_PROFILES=observability
    CONTAINERS+=(ticketing-prometheus ticketing-grafana ticketing-jaeger)
    PORTS+=("${OBSERVE_PORTS[@]}")
    # A collector that the user has set keeps the traces.
    if [[ -z ${OTEL_EXPORTER_OTLP_ENDPOINT:-} ]] && ! grep -qsE '^ *OTEL_EXPORTER_OTLP_ENDPOINT=.' "$REPO_DIR/.env"; then
        export OTEL_EXPORTER_OTLP_ENDPOINT=http://ticketing-jaeger:4318
    fi
}

# docker_start DEMO OBSERVE: each yes or no
docker_start() {
    local name
    need_engine
    need_compose
    need curl curl 'curl'
    need flock util-linux 'util-linux (flock)'
    [[ $1 == no ]] || need jq jq 'jq'
    install_missing
    lock_compose
    [[ $2 == no ]] || observe_containers
    read_ports_from_env_file
    set_default_ports
    check_names
    check_ports docker_port_holder
    find_network

    step "Docker engine $(docker version --format '{{.Server.Version}}'), ${COMPOSE[*]} $("${COMPOSE[@]}" version --short)"
    pull_images
    build_images
    step 'Starting the containers'
    # Compose leaves containers with unchanged image and settings running.
    "${COMPOSE[@]}" up --detach --no-build --remove-orphans </dev/null ||
        give_up "${COMPOSE[*]} could not start all containers: see its message above"
    # 120 seconds cover the longest start period in deploy/services.yml and some retries.
    for name in "${CONTAINERS[@]}"; do
        await_container "$name" 120
        done_with "$name is healthy"
    done
    # Checks from this machine, as users connect: a firewall may block a published port.
    await_published event-service "$EVENT_SERVICE_PORT"
    await_published booking-service "$BOOKING_SERVICE_PORT"
    await_published booking-worker "$BOOKING_WORKER_PORT"
}

await_published() {
    wait_until 30 http_ok "http://localhost:$2/health/ready" ||
        give_up "$1 is healthy, but http://localhost:$2/health/ready does not answer: does a firewall block the port, or does another program have it?"
    done_with "$1 is ready on port $2"
}

docker_addresses() {
    step 'The system is up'
    cat <<TEXT
    Event Service     http://localhost:$EVENT_SERVICE_PORT/docs
    Booking Service   http://localhost:$BOOKING_SERVICE_PORT/docs
    RabbitMQ          http://localhost:$RABBITMQ_MANAGEMENT_PORT  (guest/guest, unless .env says otherwise)
    Event database    docker exec -it event-service-db psql -U postgres -d event_service        (port $EVENT_DB_PORT)
    Booking database  docker exec -it booking-service-db psql -U booking_user -d booking_db     (port $BOOKING_DB_PORT)
    Redis             redis://localhost:$REDIS_PORT
    Logs              ${COMPOSE[*]} logs -f
TEXT
    if [[ ${COMPOSE_PROFILES:-} == observability ]]; then
        cat <<TEXT
    Dashboard         http://localhost:$GRAFANA_PORT  (admin/admin, unless .env says otherwise)
    Prometheus        http://localhost:$PROMETHEUS_PORT/alerts
    Traces            http://localhost:$JAEGER_PORT
TEXT
    fi
}

# --- stopping ---------------------------------------------------------------------------

# docker_stop keep|clean
docker_stop() {
    local options=(--remove-orphans) name left=()
    need_engine
    need_compose
    lock_compose
    find_network
    export COMPOSE_PROFILES=observability
    step 'Stopping the containers'
    [[ $1 == keep ]] || options+=(--volumes)
    # Compose 1 prints an error if the network is missing, and does the rest correctly.
    "${COMPOSE[@]}" down "${options[@]}" </dev/null ||
        die "${COMPOSE[*]} down failed: see its message above"
    if [[ $1 == keep ]]; then
        done_with 'containers removed'
        say 'The data is kept: ./start.sh uses it again, ./stop.sh --clean deletes it.'
        return
    fi
    if [[ ${TICKETING_NETWORK_EXTERNAL:-} == true ]]; then
        docker network rm "$NETWORK" >/dev/null || warn "other containers still use network $NETWORK, so it stays"
    fi
    for name in "${VOLUMES[@]}"; do
        ! docker volume inspect "$name" >/dev/null 2>&1 || left+=("$name")
    done
    ((${#left[@]} == 0)) || die "volumes are left: ${left[*]}. A container uses them: docker ps --all --filter volume=${left[0]}"
    done_with 'containers, volumes and network deleted; the images stay (docker image ls "ticketing/*")'
}
