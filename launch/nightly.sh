#!/usr/bin/env bash
# Prepares a night's data, trains, evaluates and exports, on one node or many. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
usage: launch/nightly.sh CONFIG [KEY=VALUE..]

The same command on each node. The first prepares a dataset of the night's logs; then all train a
new run on it, evaluate it and export its embeddings. Run again, it goes on where it was stopped.

  LOGS      the log, as for `cnsdiff prepare --log`: files or a pattern, any fsspec URL; what `date`
            knows of DAY is filled in: s3://bucket/logs/%Y-%m-%d/*.parquet
  NIGHTLY   where to write: NIGHTLY/data/NIGHT, NIGHTLY/runs/NIGHT, NIGHTLY/embeddings/NIGHT
  NIGHT     this night's name, the same on all nodes and when it is run again         (DAY)
  DAY       the day of the logs, in UTC           (the day before; of a CronJob's minute, if
            NIGHT ends with that, as the names of its Jobs do)
  PREPARE   further options of `cnsdiff prepare`            (--shift temporal)
  SPLIT     what is evaluated                               (test_ood)
and what launch/torchrun.sh takes. Exit codes are those of launch/torchrun.sh.
END
}

case ${1:-} in
    "" | -h | --help) usage; exit 0 ;;
esac
for name in LOGS NIGHTLY; do
    if [ -z "${!name:-}" ]; then
        echo "launch/nightly.sh: set $name; see launch/nightly.sh --help" >&2
        exit 2
    fi
done

# A shell that waits for a command does not pass signals on to it.
child=
asked=
trap 'asked=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM

run() {
    [ -z "$asked" ] || exit 75
    "$@" &
    child=$!
    local code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal to this shell ended the wait
        code=0
        wait "$child" || code=$?
    done
    child=
    if [ -n "$asked" ] && [ "$code" != 0 ]; then exit 75; fi
    [ "$code" = 0 ] || exit "$code"
}

minute=${NIGHT:-}
minute=${minute##*-}
if [[ $minute =~ ^[0-9]{8}$ ]]; then now=$((minute * 60)); else now=$(date +%s); fi
day=${DAY:-$(date -u -d "@$((now - 86400))" +%F)}
night=${NIGHT:-$day}
data=$NIGHTLY/data/$night
result=$NIGHTLY/runs/$night
node=${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-${SLURM_NODEID:-0}}}
port=${PET_MASTER_PORT:-29400}
read -ra options <<<"${PREPARE:---shift temporal}"
read -ra files <<<"$(date -u -d "$day" +"$LOGS")"

# The other nodes wait for the first one's rendezvous, and so for its dataset.
if [ "$node" = 0 ]; then
    run python -m cnsdiff_dist prepare "$data" --if-missing --log "${files[@]}" "${options[@]}"
fi
# Each command has its own rendezvous, so that a node that is ahead does not join the one that ends.
JOIN_SECONDS=${JOIN_SECONDS:-36000} PET_MASTER_PORT=$port \
    run launch/torchrun.sh train "$@" "data.url=$data" "run.dir=$result"
# All nodes are here at about the same time, so they wait only briefly for each other: a node that
# was started again is still at the training and needs the other nodes there.
export JOIN_SECONDS=120
PET_MASTER_PORT=$((port + 1)) run launch/torchrun.sh evaluate "$result" --split "${SPLIT:-test_ood}"
PET_MASTER_PORT=$((port + 2)) run launch/torchrun.sh export "$result" "$NIGHTLY/embeddings/$night"
