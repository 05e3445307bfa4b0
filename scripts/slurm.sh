#!/usr/bin/env bash
# SLURM template: one task a node, torchrun on each. Everything comes from the environment:
#
#   RECIPE=configs/coin_llava7b.yaml METHOD=llaca SEED=0 FLAGS="--zero 2" \
#       sbatch --nodes 1 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 scripts/slurm.sh
#
# SIGTERM comes ten minutes before the time is up: the run saves and ends, and SLURM starts the job again until it is
# done. `scancel --signal TERM JOB` does the same at any time; `scancel JOB` ends the job for good. GPUS_PER_NODE counts
# the processes of a node where SLURM does not count its GPUs; without it all GPUs are taken. docs/ENGINES.md, Several hosts
#SBATCH --job-name llaca
#SBATCH --ntasks-per-node 1
#SBATCH --signal TERM@600
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, in the project folder}"
source scripts/env.sh # installs on first use, here alone: below, all nodes would at once
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
# A port of its own, below those that the system hands out: other jobs may run on the first node.
export NNODES=$SLURM_NNODES MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
# srun does not take over sbatch's --cpus-per-task, and would give the task one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
status=0
# srun's status is the highest of the nodes'. By itself it may end a node's task with SIGTERM because another failed,
# and that must not look like a run that was told to save: every node ends by itself when it has lost another.
# shellcheck disable=SC2016,SC2086
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash train_continual.sh "$@"' _ \
    --recipe "${RECIPE:?the YAML file}" --method "${METHOD:-llaca}" --seed "${SEED:-0}" --launcher torchrun \
    ${gpus:+--num-gpus "$gpus"} ${FLAGS:-} || status=$?
if [ "$status" -eq 143 ]; then # 128 + SIGTERM: saved, not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
