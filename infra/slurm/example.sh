#!/bin/bash
#SBATCH --job-name=minga-usach-ab12
#SBATCH --comment=minga-usach-ab12
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=1
#SBATCH --time=1440
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/shared/minga/usach/spool
#SBATCH --output=/shared/minga/usach/spool/slurm/job-%j.log
#SBATCH --partition=gpu
#SBATCH --account=latam
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --constraint=h200&ib
# Written by minga; a new one is written for every submission.
set -uo pipefail
export HF_HUB_OFFLINE=1
export NCCL_DEBUG=WARN
spool=/shared/minga/usach/spool
nonce=ab12
mark="$spool/slurm"
mine() { [ "$(cat "$mark/nonce" 2>/dev/null)" = "$nonce" ]; }
mine || { echo "minga: another allocation serves this spool"; exit 0; }
module load cuda/12.6
rm -f "$spool/drain" "$spool/worker.json" "$spool/alive"
drain() { [ -e "$spool/drain" ] || echo "$1" >"$spool/drain"; }
trap 'drain walltime' USR1
seen() { stat -c %Y "$mark/agent" 2>/dev/null || echo 0; }
(
  while sleep 15; do
    mine || drain superseded
    [ $(($(date +%s) - $(seen))) -lt 3600 ] || drain agent
  done
) &
watch=$!
trap 'kill "$watch" 2>/dev/null' EXIT
hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST")); head=${hosts[0]}
attempt=0
while :; do
  attempt=$((attempt + 1))
  echo "minga: start ${SLURM_RESTART_COUNT:-0}.$attempt of the worker"
  srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task=64 /shared/minga/.venv/bin/python -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$attempt" --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" -m node_agent.worker --spool /shared/minga/usach/spool &
  pid=$!; rc=0; wait "$pid" || rc=$?
  while [ "$rc" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do rc=0; wait "$pid" || rc=$?; done
  if [ "$rc" -gt 128 ]; then  # interrupted by the trap just as it ended: bash remembers its status
    again=0; wait "$pid" || again=$?
    if [ "$again" -ne 127 ]; then rc=$again; fi
  fi
  why=$(cat "$spool/drain" 2>/dev/null) || why=none
  echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} $attempt $rc ${why:-drain}" >>"$mark/ends"
  if [ "$rc" -eq 0 ] || [ -e "$spool/drain" ] || [ "$attempt" -ge 3 ]; then break; fi
done
exit "$rc"

