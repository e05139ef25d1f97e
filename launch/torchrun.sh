#!/usr/bin/env bash
# Runs a cnsdiff command on one machine, or the same command on each of many nodes. See --help.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/torchrun.sh COMMAND [ARGUMENT..]

Runs `cnsdiff COMMAND ..` on several ranks of this node and, with others, of all nodes:

  launch/torchrun.sh train configs/demo.yaml                                   # this box alone
  PET_NNODES=2 PET_MASTER_ADDR=host0 launch/torchrun.sh train configs/demo.yaml   # on each of two

Kubernetes, Kubeflow and SLURM set what it needs; elsewhere set:
  PET_NNODES           nodes, or MIN:MAX for a world that may shrink        (1, or SLURM's)
  PET_NPROC_PER_NODE   ranks of a node                                      (its GPUs, else 1)
  PET_MASTER_ADDR      the first node: a name or address that all can reach
  PET_MASTER_PORT      where it holds the rendezvous                        (29400)
  PET_NODE_RANK        0 on the first node                                  (found out by address)
  PET_MAX_RESTARTS     how often the ranks are started again after a loss   (10)
  JOIN_SECONDS         how long a node waits for the others                 (1800)
  SHUTDOWN_SECONDS     from SIGTERM to SIGKILL of the ranks; more than run.grace_seconds   (30)
  CNSDIFF_HEALTH_PORT  answer probes there: /healthz, /ready                (none)
OMP_NUM_THREADS, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are found out unless they are set.

Exit code: 0 done; 2 mend something, see the one line; 75 run it again; 1 anything else.
END
}

case ${1:-} in
    "" | -h | --help) usage; exit 0 ;;
esac

nodes=${PET_NNODES:-${SLURM_JOB_NUM_NODES:-1}}
node=${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-${SLURM_NODEID:-}}}
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then ranks=gpu; else ranks=1; fi

options=(
    --nnodes "$nodes"
    --nproc-per-node "${PET_NPROC_PER_NODE:-$ranks}"
    --max-restarts "${PET_MAX_RESTARTS:-10}"
    --shutdown-timeout "${SHUTDOWN_SECONDS:-30}"
)
if [ "$nodes" = 1 ]; then
    options+=(--standalone)
else
    if [ -z "${PET_MASTER_ADDR:-}" ]; then
        echo "launch/torchrun.sh: PET_NNODES=$nodes needs PET_MASTER_ADDR, the first node" >&2
        exit 2
    fi
    rendezvous="join_timeout=${JOIN_SECONDS:-1800}"
    # A node that is started again may have another address, but it keeps its number.
    if [ -n "$node" ]; then
        if [ "$node" = 0 ]; then host=true; else host=false; fi
        rendezvous+=",is_host=$host"
    fi
    options+=(
        --rdzv-backend c10d
        --rdzv-endpoint "$PET_MASTER_ADDR:${PET_MASTER_PORT:-29400}"
        --rdzv-id "${PET_RDZV_ID:-cnsdiff}"
        --rdzv-conf "$rendezvous"
    )
    # torchrun (2.13) remembers on which node the ranks' store was, which is wrong once nodes change.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
exec python -m cnsdiff_dist.distributed.launcher "${options[@]}" -m cnsdiff_dist "$@"
