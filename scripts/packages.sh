# shellcheck shell=bash
# Installs missing packages with apt-get, if the system has it.
#
# The packages of PostgreSQL, Redis and RabbitMQ start their own servers on the ports that this system uses, and again
# at each boot. apt-install.sh prevents that, because only the programs are needed.

# need COMMAND PACKAGE WHAT: records a missing command.
MISSING_PACKAGES=()
MISSING_THINGS=()
need() {
    if ! command -v "$1" >/dev/null 2>&1; then
        MISSING_PACKAGES+=("$2")
        MISSING_THINGS+=("$3")
    fi
}

need_basic_tools() {
    need curl curl 'curl'
    need jq jq 'jq'
    need uuidgen uuid-runtime 'uuidgen'
    need find findutils 'GNU find'
    need flock util-linux 'util-linux (flock, setsid, setpriv)'
}

need_servers() {
    if ! postgres_bin_dir >/dev/null || ! postgres_has_contrib; then
        MISSING_PACKAGES+=(postgresql postgresql-contrib)
        MISSING_THINGS+=('PostgreSQL 15 or newer (server, client and contrib modules)')
    fi
    need redis-server redis-server 'Redis 7'
    if ! rabbitmq_program >/dev/null; then
        MISSING_PACKAGES+=(rabbitmq-server)
        MISSING_THINGS+=('RabbitMQ 3 (with its management plugin)')
    fi
}

need_prometheus() {
    need prometheus prometheus 'Prometheus 2 (with promtool)'
}

need_build_tools() {
    need cc build-essential 'a C compiler'
    need pkg-config pkg-config 'pkg-config'
}

need_python() {
    if ! python3 -c 'import venv, ensurepip' >/dev/null 2>&1; then
        MISSING_PACKAGES+=(python3 python3-venv)
        MISSING_THINGS+=('Python 3.10 or newer, with venv')
    fi
}

need_cargo() {
    command -v cargo >/dev/null 2>&1 && return
    die "Rust is not installed. Install it with rustup (https://rustup.rs), which needs no root
       and installs into your home folder. Then run this again."
}

# A minimal Rust installation has neither formatter nor linter.
need_cargo_components() {
    local component
    for component in fmt clippy; do
        if ! cargo "$component" --version >/dev/null 2>&1; then
            step 'Installing rustfmt and clippy'
            rustup component add rustfmt clippy ||
                die 'rustfmt and clippy are missing: install them with the same tool as Rust itself'
            return
        fi
    done
}

install_missing() {
    ((${#MISSING_PACKAGES[@]} > 0)) || return 0
    local thing
    if ! command -v apt-get >/dev/null 2>&1; then
        printf 'Please install these with the package manager of your system:\n' >&2
        for thing in "${MISSING_THINGS[@]}"; do printf '  - %s\n' "$thing" >&2; done
        die 'this script can install packages only on systems with apt-get'
    fi

    local root=()
    if ((EUID != 0)); then
        root=(sudo)
        # Without a terminal sudo can ask for no password.
        [[ -t 0 ]] || root=(sudo --non-interactive)
        if ! command -v sudo >/dev/null 2>&1 || ! "${root[@]}" true; then
            die "root must install some packages first:
       apt-get install ${MISSING_PACKAGES[*]}"
        fi
    fi

    step "Installing ${MISSING_PACKAGES[*]}"
    if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        bash "$REPO_DIR/scripts/apt-install.sh" "${MISSING_PACKAGES[@]}" </dev/null; then
        die "apt-get could not install: ${MISSING_PACKAGES[*]} (see its messages above)"
    fi
    MISSING_PACKAGES=()
    MISSING_THINGS=()
    hash -r
}
