# shellcheck shell=bash
# Installs what is missing, by apt-get where there is one.
#
# The packages of PostgreSQL, Redis and RabbitMQ start a server of their own on the very
# ports we use, and again at each boot. We want the programs only.

# need COMMAND PACKAGE WHAT: notes a missing command.
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
    die "Rust is not installed. Get it with rustup (https://rustup.rs), which needs no root:
       it installs into your home folder. Then run this again."
}

# Formatter and linter are parts that a minimal Rust installation leaves out.
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
        printf 'Please install, with what your system offers for it:\n' >&2
        for thing in "${MISSING_THINGS[@]}"; do printf '  - %s\n' "$thing" >&2; done
        die 'this script can install packages by itself only where there is apt-get'
    fi

    local root=()
    if ((EUID != 0)); then
        root=(sudo)
        # Nobody can type a password when there is no terminal.
        [[ -t 0 ]] || root=(sudo --non-interactive)
        if ! command -v sudo >/dev/null 2>&1 || ! "${root[@]}" true; then
            die "root has to install some packages first:
       apt-get install ${MISSING_PACKAGES[*]}"
        fi
    fi

    step "Installing ${MISSING_PACKAGES[*]}"
    if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        bash "$REPO_DIR/scripts/apt-install.sh" "${MISSING_PACKAGES[@]}" </dev/null; then
        die "apt-get could not install: ${MISSING_PACKAGES[*]} (its own messages are above)"
    fi
    MISSING_PACKAGES=()
    MISSING_THINGS=()
    hash -r
}
