#!/usr/bin/env bash
# Builds the image with buildah, without docker, and runs it as a cluster would. See --help.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/image.sh build --store DIR [OPTION..]
       launch/image.sh check [--store DIR] [OPTION..]

build   builds the image of the Dockerfile into the store
check   builds it unless the store has it, then runs it as its own user, with a read-only root and
        without capabilities or a network: prepares data, trains, ends the training with SIGTERM,
        goes on with it on 2 ranks, probes its health, and evaluates

  --store DIR         where buildah keeps images          (a temporary folder, removed at the end)
  --lock cpu|cuda     which libraries                                                  (cpu)
  --tag NAME          name of the image                                                (cnsdiff:LOCK)
  --base IMAGE        what it starts from                              (that of the Dockerfile)
  --bootstrap         make the base with debootstrap, where no registry can be reached: for trials,
                      since it is without Debian's security updates
  --format docker|oci oci: builds of one commit are one image, as long as Debian's mirror has the same
                      packages, but without the health check, which only docker's format has (docker)
  --archive FILE      also write the image to a file, for `docker load` or `podman load`

It needs root, buildah, 10 GB of disk and, for --bootstrap, debootstrap. pip's variables are heeded:
PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS (a folder) and PIP_CERT. SOURCE_URL fills the label of
that name. STORAGE_DRIVER=overlay is quicker than vfs, where it works.
END
}

main() {
    case ${1:-} in
        "" | -h | --help) usage; exit 0 ;;
        build | check) ;;
        *) refuse "$1: no such command, see --help" ;;
    esac
    read_options "${@:2}"
    [ "$(id -u)" = 0 ] || refuse "needs root"
    cd "$(dirname "$0")/.."
    [ "$1" = check ] || [ -n "$store$archive" ] || refuse "build needs --store or --archive"
    work=$(mktemp -d)
    store=${store:-$work/store}
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    mkdir -p "$store/tmp"
    export TMPDIR=$store/tmp  # otherwise buildah fills /var/tmp

    if [ "$1" = build ] || ! image . >/dev/null 2>&1; then build; fi
    if [ "$1" = check ]; then check; fi
}

read_options() {
    store='' lock=cpu tag='' base='' bootstrap='' format=docker archive=''
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --bootstrap) bootstrap=yes; shift; continue ;;
            --store | --lock | --tag | --base | --format | --archive) ;;
            *) refuse "$1: no such option, see --help" ;;
        esac
        [ $# -gt 1 ] || refuse "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift 2
    done
    [[ $lock =~ ^(cpu|cuda)$ ]] || refuse "--lock is cpu or cuda"
    [[ $format =~ ^(docker|oci)$ ]] || refuse "--format is docker or oci"
    tag=${tag:-cnsdiff:$lock}
    if [ -n "$store" ]; then store=$(realpath -m "$store"); fi
    if [ -n "$archive" ]; then archive=$(realpath -m "$archive"); fi
}

refuse() {
    echo "launch/image.sh: $*" >&2
    exit 2
}

fail() {
    echo "launch/image.sh: FAILED: $*" >&2
    exit 1
}

say() {
    echo "== $*"
}

# The mounts of a check are in namespaces that end with their first process, which is killed here, so
# nothing has to unmount them. buildah unmounts its own.
clean_up() {
    trap '' INT TERM
    if [ -n "${child:-}" ]; then pkill -KILL --parent "$child" || kill -KILL "$child" || true; fi
    wait 2>/dev/null
    buildah_ rm --all >/dev/null 2>&1 || true
    rm -rf "$work"
}

# Runs the command in the background, since bash handles Ctrl-C and SIGTERM only after a command in the
# foreground has ended.
quietly() {
    "$@" >"$work/log" 2>&1 &
    child=$!
    finish 0
}

finish() {
    local status=0
    wait "$child" || status=$?
    child=''
    if [ "$status" = "$1" ]; then return; fi
    tail -n 30 "$work/log" >&2
    fail "ended with $status instead of $1"
}

buildah_() {
    buildah --root "$store/root" --runroot "$store/runroot" \
        --storage-driver "${STORAGE_DRIVER:-vfs}" "$@"
}

image() {
    buildah_ inspect --type image --format "{{$1}}" "$tag"
}

build() {
    local began=$SECONDS epoch options=()
    # All times are those of the commit, so that two builds of one commit can be equal.
    epoch=$(git log -1 --format=%ct)
    if [ -n "$bootstrap" ]; then bootstrap_base "$epoch"; fi
    if [ -n "$base" ]; then options+=(--build-arg "BASE=$base"); fi
    if [ -n "${PIP_INDEX_URL:-}" ]; then options+=(--build-arg PIP_INDEX_URL); fi
    if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then options+=(--build-arg PIP_EXTRA_INDEX_URL); fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then options+=(--build-context "wheels=$PIP_FIND_LINKS"); fi
    if [ -n "${PIP_CERT:-}" ]; then options+=(--secret "id=ca,src=$PIP_CERT"); fi

    say "build $tag"
    quietly buildah_ build --isolation chroot --format "$format" --layers=false --force-rm \
        --timestamp "$epoch" "${options[@]}" \
        --build-arg "LOCK=$lock" \
        --build-arg "CREATED=$(date -u -d "@$epoch" +%FT%TZ)" \
        --build-arg "REVISION=$(git describe --always --dirty --abbrev=40 --exclude='*')" \
        --build-arg "SOURCE=${SOURCE_URL:-}" \
        --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
        --tag "$tag" .
    echo "$(image .FromImageDigest) in $((SECONDS - began)) s"
    if [ -n "$archive" ]; then quietly buildah_ push "$tag" "$format-archive:$archive:$tag"; fi
}

# Leaves out the files that debian:bookworm-slim leaves out, and those that name this machine.
bootstrap_base() {
    base=localhost/bookworm
    say "base: debootstrap"
    quietly debootstrap --variant=minbase bookworm "$work/debian"
    tar --create --file "$work/debian.tar" --directory "$work/debian" --sort=name --numeric-owner \
        --exclude='./dev/*' --exclude=./etc/hostname --exclude=./etc/resolv.conf \
        --exclude='./usr/share/doc/*' --exclude='./usr/share/locale/*' --exclude='./usr/share/man/*' \
        --exclude='./var/cache/*/*' --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' .
    rm -r "$work/debian"
    cat >"$work/Dockerfile" <<'END'
FROM scratch
ADD debian.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["bash"]
END
    quietly buildah_ build --isolation chroot --timestamp "$1" --tag "$base" "$work"
    rm "$work/debian.tar"
}

check() {
    say "check $tag"
    copy=$(buildah_ from --pull-never "$tag")
    root=$(buildah_ mount "$copy")
    user=$(image .OCIv1.Config.User)
    folder=$(image .OCIv1.Config.WorkingDir)
    environment=() entrypoint=() default=() probe=()
    read_list environment .OCIv1.Config.Env
    read_list entrypoint .OCIv1.Config.Entrypoint
    read_list default .OCIv1.Config.Cmd
    read_list probe .Docker.Config.Healthcheck.Test
    export root user folder work
    # Every container runtime writes this file; an image does not have it.
    echo "127.0.0.1 localhost node" >"$root/etc/hosts"
    check_files
    check_processes
    say "all checks passed"
}

# Reads a list of the image's config. Its words may contain line ends but no zero bytes.
read_list() {
    mapfile -d '' -t "$1" < <(image "range $2}}{{.}}{{printf \"\\x00\"}}{{end")
}

check_files() {
    echo "$(du -sm "$root" | cut -f1) MB, user $user, labels:"
    # shellcheck disable=SC2016  # Go's variables, not the shell's
    image 'range $name, $value := .OCIv1.Config.Labels}}{{printf "  %s=%s\n" $name $value}}{{end'
    [ "$user" = 1000:1000 ] || fail "its user is not 1000:1000"
    none "tools to build with" \
        chroot "$root" bash -c 'type -P as c++ cc clang g++ gcc ld make nvcc pip pip3 || true'
    none "files that change the user" find "$root" -xdev -type f -perm /6000
    none "what the build left" \
        find "$root"/{tmp,run,var/cache/apt,var/lib/apt/lists,var/log} -type f
}

none() {
    local found
    found=$("${@:2}")
    [ -z "$found" ] || fail "$1: $found"
    echo "none there: $1"
}

# Prepares data, trains and evaluates, with a preemption in the middle of the training.
check_processes() {
    install -d -o "${user%:*}" -g "${user#*:}" "$work/data" "$work/runs"
    say "${default[*]}"
    run "${default[@]}"
    say "prepare"
    run cnsdiff prepare data/demo --synthetic
    say "train in one process; SIGTERM to the first process, which is ${entrypoint[0]}"
    # The patience has it train all its epochs, so that a fast machine still trains when SIGTERM comes.
    local train=(train configs/demo.yaml train.patience=30)
    start "${entrypoint[@]}" cnsdiff "${train[@]}"
    wait_for grep -q "^epoch" "$work/log"
    show_processes
    kill -TERM "$(first)"
    finish 75
    grep "checkpointed at step" "$work/log" || fail "it did not say where it stopped"
    say "go on with it on 2 ranks"
    start CNSDIFF_HEALTH_PORT=8080 PET_NPROC_PER_NODE=2 "${entrypoint[@]}" \
        launch/torchrun.sh "${train[@]}"
    check_health
    # Any epoch will do: where the training goes on depends on when the signal came.
    wait_for grep -q "^epoch" "$work/log"
    show_processes
    finish 0
    grep -e "2 cpu ranks" -e resumed -e finished "$work/log"
    say "evaluate"
    run cnsdiff evaluate runs/demo --split test_ood
    grep -e " all " -e written "$work/log"
}

run() {
    start "${entrypoint[@]}" "$@"
    finish 0
}

# Runs a command, with variables before it, as the first process of a container.
start() {
    : >"$work/log"  # at once: wait_for must not find its words in the log of the command before
    unshare --mount --pid --net --ipc --uts --fork --kill-child \
        bash -euc 'enter "$@"' enter "${environment[@]}" "$@" >"$work/log" 2>&1 &
    child=$!
}

enter() {
    local node
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in "null 3" "zero 5" "full 7" "random 8" "urandom 9"; do
        mknod -m 666 "$root/dev/${node% *}" c 1 "${node#* }"
    done
    ln -s /proc/self/fd "$root/dev/fd"
    mkdir "$root/dev/shm"
    # noexec, as docker mounts them: files that are written there cannot be run.
    for node in dev/shm tmp cache; do
        mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$root/$node"
    done
    mount --bind "$work/data" "$root$folder/data"
    mount --bind "$work/runs" "$root$folder/runs"
    mount -o remount,bind,ro "$root"
    ip link set lo up
    hostname node
    exec chroot "$root" setpriv --reuid="${user%:*}" --regid="${user#*:}" --clear-groups \
        --bounding-set=-all --no-new-privs env --ignore-environment --chdir="$folder" "$@"
}
export -f enter

first() {
    pgrep --parent "$child"
}

wait_for() {
    local left=1500
    until "$@"; do
        sleep 0.2
        kill -0 "$child" 2>/dev/null || finish "going on"
        [ $((left -= 1)) -gt 0 ] || fail "waited in vain for: $*"
    done
}

show_processes() {
    local processes
    processes=$(ps -o uid=,args= -p "$(pgrep --ns "$(first)" --nslist pid | paste -sd,)")
    echo "$processes" | cut -c 1-100
    if echo "$processes" | grep -q '^ *0 '; then fail "root runs something"; fi
}

check_health() {
    if [ ${#probe[@]} = 0 ]; then say "no health check: the image is of the oci format"; return; fi
    wait_for healthy CNSDIFF_HEALTH_PORT=8080
    healthy || fail "unhealthy where no port was asked for"
    if healthy CNSDIFF_HEALTH_PORT=8081; then fail "healthy at a port where nothing is"; fi
    say "healthy at the port, and without one; unhealthy at another"
}

# Runs the image's health check in the namespaces of the first process.
healthy() {
    nsenter --target "$(first)" --mount --pid --net chroot --userspec="$user" "$root" \
        env --ignore-environment "${environment[@]}" "$@" "${probe[@]:1}" 2>/dev/null
}

main "$@"
