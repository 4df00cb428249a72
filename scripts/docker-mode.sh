# shellcheck shell=bash
# Docker mode: the whole system in containers, by docker-compose.yml. Sourced after native-mode.sh, for its ports, by scripts
# that have gone to the top folder, where Compose looks for its file.

# In the order in which they start.
CONTAINERS=(event-service-db booking-service-db ticketing-redis ticketing-rabbitmq
    event-service booking-service booking-worker)
readonly VOLUMES=(ticketing_event_db ticketing_booking_db ticketing_redis ticketing_rabbitmq ticketing_prometheus)
readonly NETWORK=ticketing_network

# --- the engine -------------------------------------------------------------------------

# engine_answers: why it does not is left in ENGINE_PROBLEM. An engine that hangs counts as none.
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
        *'permission denied'*) ENGINE_PROBLEM='this user may not talk to the Docker engine' ;;
        *) ENGINE_PROBLEM='the Docker engine does not run' ;;
    esac
    return 1
}

need_engine() {
    engine_answers && return
    case $ENGINE_PROBLEM in
        *installed) die "$ENGINE_PROBLEM. Get it from https://docs.docker.com/get-docker, or go on without it: ./start.sh --native" ;;
        *may\ not*) die "$ENGINE_PROBLEM. Use sudo, or join the group docker and log in again" ;;
        *) die "$ENGINE_PROBLEM. Start it (systemctl start docker, or Docker Desktop), or go on without it: ./start.sh --native" ;;
    esac
}

# Compose 2 is a part of docker, Compose 1 a program of its own.
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
    find_compose || die 'Compose is not installed. Get the package docker-compose-plugin or docker-compose, or go on without it: ./start.sh --native'
    # Compose 2 hands builds to this plugin, and fails where it is missing; the builder before it needs none.
    if [[ -z ${DOCKER_BUILDKIT:-} ]] && ! docker buildx version >/dev/null 2>&1; then
        export DOCKER_BUILDKIT=0
    fi
}

# Compose 2 refuses a network of this name that it has not made itself, unless it is told that the network is not its own.
find_network() {
    local made_by_compose
    made_by_compose=$(docker network inspect --format '{{index .Labels "com.docker.compose.network"}}' "$NETWORK" 2>/dev/null) || return 0
    [[ -n $made_by_compose ]] || export TICKETING_NETWORK_EXTERNAL=true
}

# Reading locks the file: two of these at once would make the same containers twice.
lock_compose() {
    exec {COMPOSE_LOCK}<"$REPO_DIR/docker-compose.yml"
    flock --nonblock "$COMPOSE_LOCK" || die 'another start or stop is at work in this folder'
}

# --- what is there ----------------------------------------------------------------------

# The folder from which Compose has started a container.
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

# The names are fixed, so a container of somebody else's with one of them is in the way.
check_names() {
    local name folder problems=()
    for name in "${CONTAINERS[@]}"; do
        folder=$(started_from "$name") || continue
        if [[ -z $folder ]]; then
            problems+=("there is another container with the name $name: docker rm --force $name")
        elif [[ $folder != "$REPO_DIR" ]]; then
            problems+=("container $name was started from $folder: (cd $folder && ${COMPOSE[*]} down)")
        fi
    done
    ((${#problems[@]} > 0)) || return 0
    for name in "${problems[@]}"; do printf '%serror:%s %s\n' "$RED" "$PLAIN" "$name" >&2; done
    die 'nothing has been started'
}

# Who has the port, unless that is nobody or we.
docker_port_holder() {
    local container
    container=$(docker ps --quiet --filter "publish=$1" | head -n 1)
    if [[ -z $container ]]; then
        ! port_taken "$1" || describe_process "$(port_owner "$1")"
    elif [[ $(started_from "$container") != "$REPO_DIR" ]]; then
        printf 'container %s' "$(docker inspect --format '{{slice .Name 1}}' "$container")"
    fi
}

# Compose reads .env by itself. The ports in it have to be known here, too; the environment wins, as it does there.
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

# Before anything is started, so that what is missing is named by itself and not among the messages of seven containers.
pull_images() {
    local config image images output
    config=$("${COMPOSE[@]}" config) || die "docker-compose.yml or .env has a fault: ${COMPOSE[*]} says above which"
    # Older Compose shows services of profiles that nobody has asked for, too.
    mapfile -t images < <(awk -v with_profiles="${COMPOSE_PROFILES:-}" '
        function service_ends() { if (image != "" && (!has_profile || with_profiles != "")) print image; image = ""; has_profile = 0 }
        /^(  )?[^ ]/ { service_ends() }
        /^    profiles:/ { has_profile = 1 }
        /^    image:/ && $2 !~ /^ticketing\// { image = $2 }
        END { service_ends() }' <<<"$config" | sort -u)
    for image in "${images[@]}"; do
        ! docker image inspect "$image" >/dev/null 2>&1 || continue
        say "pulling $image"
        # The largest has 250 MB; whoever needs longer than this can pull it by hand.
        output=$(timeout 1800 docker pull --quiet "$image" 2>&1) ||
            die "image $image can't be pulled: ${output##*$'\n'}
       Try it by hand (docker pull $image): it needs a way to the registry, perhaps a proxy or docker login"
    done
}

build_images() {
    local profile=${TICKETING_BUILD_PROFILE:-release} log
    case $profile in
        release | dev) ;;
        *) die "TICKETING_BUILD_PROFILE is '$profile': release or dev" ;;
    esac
    step "Building the images ($profile; the first time takes some minutes)"
    log=$(mktemp)
    if ! "${COMPOSE[@]}" build 2>&1 | tee "$log"; then
        if grep -qiE 'failed to (resolve|do request|authorize)|pull access denied|manifest (for|unknown)|toomanyrequests|no such host|i/o timeout|could not resolve host' "$log"; then
            rm -f "$log"
            die 'an image or a package that the build needs could not be fetched (see above): check the network, the proxy, and docker login'
        fi
        rm -f "$log"
        die 'the images could not be built: the messages of the build are above'
    fi
    rm -f "$log"
}

# The state and, where there is one, the health of a container: "running healthy".
container_state() {
    local state
    # docker prints an empty line for a container that is not there.
    state=$(docker inspect --format '{{.State.Status}}{{if .State.Health}} {{.State.Health.Status}}{{end}}' "$1" 2>/dev/null) || state=missing
    printf '%s' "$state"
}

# Shows what a container that is not well has said last.
show_container() {
    printf '\n--- %s is %s; last lines of docker logs %s\n' "$1" "$(container_state "$1")" "$1" >&2
    docker logs --tail 25 "$1" >&2 2>&1 || true
    docker inspect --format '{{if .State.Health}}{{range .State.Health.Log}}{{.Output}}{{end}}{{end}}' "$1" 2>/dev/null |
        grep -v '^$' | tail -n 3 | sed 's/^/health check: /' >&2 || true
    printf -- '---\n' >&2
}

# give_up REASON: shows each container that is there and not healthy, or, when all are, nothing more.
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
        # A container that dies is started again by the engine; one that does so all the time runs into this.
        ((SECONDS < deadline)) || give_up "container $name was not healthy within $2 seconds, but $state"
        sleep 0.5
    done
}

# Compose starts them, and knows of them at all, with their profile only.
observe_containers() {
    export COMPOSE_PROFILES=observability
    CONTAINERS+=(ticketing-prometheus ticketing-grafana ticketing-jaeger)
    PORTS+=("${OBSERVE_PORTS[@]}")
    # Traces go to another collector where one is named.
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
    # Containers whose image and settings are as before are left alone.
    "${COMPOSE[@]}" up --detach --no-build --remove-orphans </dev/null ||
        give_up "${COMPOSE[*]} could not start all containers: its own message is above"
    # As long as the longest of their own start periods, and some retries.
    for name in "${CONTAINERS[@]}"; do
        await_container "$name" 120
        done_with "$name is healthy"
    done
    # From here, as users will come: the port may be published, and something between may still be wrong.
    await_published event-service "$EVENT_SERVICE_PORT"
    await_published booking-service "$BOOKING_SERVICE_PORT"
    await_published booking-worker "$BOOKING_WORKER_PORT"
}

await_published() {
    wait_until 30 http_ok "http://localhost:$2/health/ready" ||
        give_up "$1 is healthy, but http://localhost:$2/health/ready does not answer: does a firewall or another program have the port?"
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
    # Compose 1 complains of the network when it is not there, and is right otherwise.
    "${COMPOSE[@]}" down "${options[@]}" </dev/null ||
        die "${COMPOSE[*]} down has failed: its own message is above"
    if [[ $1 == keep ]]; then
        done_with 'containers removed'
        say 'The data is kept: ./start.sh goes on with it, ./stop.sh --clean deletes it.'
        return
    fi
    if [[ ${TICKETING_NETWORK_EXTERNAL:-} == true ]]; then
        docker network rm "$NETWORK" >/dev/null || warn "network $NETWORK is still used by other containers, and stays"
    fi
    for name in "${VOLUMES[@]}"; do
        ! docker volume inspect "$name" >/dev/null 2>&1 || left+=("$name")
    done
    ((${#left[@]} == 0)) || die "volumes are left: ${left[*]}. A container uses them: docker ps --all --filter volume=${left[0]}"
    done_with 'containers, volumes and network deleted; the images stay (docker image ls "ticketing/*")'
}
