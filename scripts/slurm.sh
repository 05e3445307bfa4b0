#!/usr/bin/env bash
# SLURM template: one task a node, torchrun on each. Everything comes from the environment:
#
#   RECIPE=configs/coin_llava7b.yaml METHOD=llaca SEED=0 FLAGS="--zero 2" \
#       sbatch --nodes 1 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh
#
# SIGTERM comes two minutes before the time is up: the run saves, and SLURM starts the job again until it is done.
#SBATCH --job-name llaca
#SBATCH --ntasks-per-node 1
#SBATCH --signal TERM@120
#SBATCH --requeue
#SBATCH --output slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, in the project folder}"
export NNODES=$SLURM_NNODES MASTER_PORT=${MASTER_PORT:-29500}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
status=0
# shellcheck disable=SC2016,SC2086
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash train_continual.sh "$@"' _ \
    --recipe "${RECIPE:?the YAML file}" --method "${METHOD:-llaca}" --seed "${SEED:-0}" --launcher torchrun \
    --num-gpus "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}" ${FLAGS:-} || status=$?
if [ "$status" -eq 143 ]; then  # 128 + SIGTERM: saved, not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
