#!/usr/bin/env bash
# Trains a stream of tasks one after another. Without arguments: LoRA and LLaCA on CoIN-mini, side by side.
#
#   bash train_continual.sh [--recipe FILE] [--method NAME] [--order original|reverse|alphabet]
#                           [--instructions original|diverse|10type] [--seed N] [--run NAME] [--smoke] [--FIELD VALUE ...]
#                           [--launcher python|torchrun|deepspeed] [--num-gpus N] [--hostfile FILE]
#                           [--zero 0|1|2|3|3-offload]
#
# One process on a machine without GPU, DDP (torchrun) on all GPUs otherwise, DeepSpeed with --zero. --hostfile: several
# machines, a line HOST slots=N each (docs/ENGINES.md).
# Typed again after an interruption it goes on with the first stage that is not done. Every field: --help
source "$(dirname "$0")/scripts/env.sh"
exec python -m llaca.launch "$@"
