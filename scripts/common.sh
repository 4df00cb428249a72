# shellcheck shell=bash
# Every script sources this file: output, waiting for conditions, TCP ports and the state folder.

REPO_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# A user who has just installed Rust has it here, but not yet in the PATH of this shell.
if [[ -d ${HOME:-}/.cargo/bin ]]; then
    PATH=$PATH:$HOME/.cargo/bin
fi

# --- output -----------------------------------------------------------------------------

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' PLAIN=$'\e[0m'
else
    BOLD='' RED='' GREEN='' YELLOW='' PLAIN=''
fi

step() { printf '%s==> %s%s\n' "$BOLD" "$*" "$PLAIN"; }
say() { printf '    %s\n' "$*"; }
done_with() { printf '    %sok%s  %s\n' "$GREEN" "$PLAIN" "$*"; }
warn() { printf '%swarning:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }
die() {
    printf '%serror:%s %s\n' "$RED" "$PLAIN" "$*" >&2
    exit 1
}

# read_common_option ARGUMENT: reads an option that start.sh and stop.sh share. It sets mode, prints their usage, or
# ends the script with status 2.
read_common_option() {
    # shellcheck disable=SC2034  # the scripts that source this one read mode
    case $1 in
        --native) mode=native ;;
        --docker) mode=docker ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
}

# Without this, set -e ends a script without a message when a silent command fails.
name_failures() {
    set -o errtrace
    trap 'warn "failed: $BASH_COMMAND (${BASH_SOURCE[0]##*/}, line $LINENO)"' ERR
}

# --- waiting ----------------------------------------------------------------------------

# wait_until SECONDS COMMAND...: true as soon as the command succeeds, false at the deadline.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

http_ok() {
    curl --silent --fail --output /dev/null --noproxy '*' --max-time 5 "$@"
}

# --- ports ------------------------------------------------------------------------------
# Read from /proc, because a minimal system has neither ss nor lsof.

listening_inodes() {
    local hex
    printf -v hex '%04X' "$1"
    awk -v port="$hex" '
        $4 == "0A" { n = split($2, address, ":"); if (address[n] == port) print $10 }
    ' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true
}

port_taken() { [[ -n $(listening_inodes "$1") ]]; }

# Prints the process that listens on a port. Prints nothing if the process belongs to a user whose files are closed to
# us.
port_owner() {
    local inode
    for inode in $(listening_inodes "$1"); do
        find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null || true
    done | awk -F/ 'NR == 1 { print $3 }'
}

describe_process() {
    local pid=$1 command
    if [[ -z $pid ]]; then
        printf 'a process of another user (run this as root to see which)'
        return
    fi
    command=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" || true)
    printf 'pid %s, %s' "$pid" "$(cat "/proc/$pid/comm" 2>/dev/null || printf 'already ended')"
    [[ -z $command ]] || printf ' (%.80s)' "$command"
}

# pick_port VARIABLE: puts a free port into VARIABLE. The port is below the range for outgoing connections, so that none
# of those can take it before the server listens.
PICKED_PORTS=' '
keep_port() { PICKED_PORTS+="$1 "; }
pick_port() {
    local port
    while true; do
        port=$((20000 + RANDOM % 10000))
        [[ $PICKED_PORTS != *" $port "* ]] || continue
        ! port_taken "$port" || continue
        break
    done
    keep_port "$port"
    printf -v "$1" '%s' "$port"
}

# --- the state folder -------------------------------------------------------------------
#   run/   pid files      only the caller writes them, because root ends the processes that they name
#   logs/  output         the caller opens the files, and the servers inherit them
#   data/  server data    the unprivileged user reads and writes it

STATE_MARKER=.ticketing-state

# PostgreSQL and RabbitMQ should not run as root (PostgreSQL refuses to), so root starts its daemons as this user.
RUN_USER=ticketing
RUN_AS=()

use_state_dir() {
    STATE_DIR=$1
    [[ $STATE_DIR == /* ]] || STATE_DIR=$REPO_DIR/$STATE_DIR
    RUN_DIR=$STATE_DIR/run
    LOG_DIR=$STATE_DIR/logs
    DATA_DIR=$STATE_DIR/data
    if [[ -L $DATA_DIR ]]; then
        DATA_DIR=$(readlink "$DATA_DIR")
    fi
}

# Prints the data folder for a state folder that the unprivileged user can't enter, as in /root.
outside_data_dir() {
    printf '/var/lib/ticketing-%s' "$(printf '%s' "$STATE_DIR" | sha256sum | cut -c 1-12)"
}

own_state_dir() {
    [[ -w $STATE_DIR/$STATE_MARKER ]] ||
        die "$STATE_DIR belongs to another user: run this as that user, or set TICKETING_STATE_DIR"
}

prepare_state_dir() {
    if [[ ! -e $STATE_DIR/$STATE_MARKER ]]; then
        mkdir -p "$STATE_DIR"
        : >"$STATE_DIR/$STATE_MARKER"
    fi
    own_state_dir
    mkdir -p "$RUN_DIR" "$LOG_DIR"

    if ((EUID == 0)); then
        if ! id "$RUN_USER" >/dev/null 2>&1; then
            useradd --system --user-group --no-create-home --home-dir /nonexistent \
                --shell /usr/sbin/nologin "$RUN_USER"
        fi
        RUN_AS=(setpriv "--reuid=$RUN_USER" "--regid=$(id -g "$RUN_USER")" --clear-groups)
        if [[ ! -e $DATA_DIR ]] && ! "${RUN_AS[@]}" test -x "$STATE_DIR"; then
            DATA_DIR=$(outside_data_dir)
            ln -sfn "$DATA_DIR" "$STATE_DIR/data"
            say "user $RUN_USER can't enter $STATE_DIR, so the data is in $DATA_DIR"
        fi
    fi
    mkdir -p "$DATA_DIR"
    [[ ${#RUN_AS[@]} -eq 0 ]] || "${RUN_AS[@]}" test -x "$DATA_DIR" ||
        die "user $RUN_USER can't enter $DATA_DIR: set TICKETING_STATE_DIR to a folder it can enter"
}

# prepare_data_dir NAME: makes a folder in data/ that only the daemon's user may read.
prepare_data_dir() {
    mkdir -p "$DATA_DIR/$1"
    chmod 700 "$DATA_DIR/$1"
    ((EUID != 0)) || chown "$RUN_USER:" "$DATA_DIR/$1"
}

# Removes only what these scripts made, so that a mistyped folder name deletes nothing.
remove_state() {
    [[ -e $STATE_DIR/$STATE_MARKER ]] || return 0
    if [[ -L $STATE_DIR/data && $DATA_DIR == "$(outside_data_dir)" ]]; then
        rm -rf "$DATA_DIR"
    fi
    rm -rf "${STATE_DIR:?}/data" "${STATE_DIR:?}/run" "${STATE_DIR:?}/logs"
    rm -f "$STATE_DIR/env.sh" "$STATE_DIR/lock" "$STATE_DIR/$STATE_MARKER"
    rmdir "$STATE_DIR" 2>/dev/null || true
}

# Two runs at once on one state folder would start everything twice.
lock_state() {
    own_state_dir
    exec {STATE_LOCK}>"$STATE_DIR/lock"
    flock --nonblock "$STATE_LOCK" ||
        die "another start or stop is running on $STATE_DIR"
}
