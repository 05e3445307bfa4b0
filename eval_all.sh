#!/usr/bin/env bash
# Answers every seen task's test set with every stage's parameters, scores the answers and prints the tables.
#
#   bash eval_all.sh [--run NAME ...] [--cells final|diagonal|triangle|full] [--split dev] [--num-gpus N] [--open]
#
# Without arguments: every run under runs/, the lower triangle of the matrix, a process on every GPU or CPU core.
# Writes runs/NAME/matrix.csv, metrics.json and figures/. Answers that exist are not computed again. --open opens the page.
source "$(dirname "$0")/scripts/env.sh"
exec python -m eval.report "$@"
