#!/usr/bin/env bash
# avalanche-lib 0.6.0, cl-gym 1.0.3, continuum 1.2.7, gmumcl 1.1.0: forgetting, backward and forward transfer of one run.
#
# One matrix of accuracies, a row a stage, goes through each library's own code. Forgetting is first minus last
# (avalanche), best of all stages minus last, so that it is never negative (cl-gym, gmumcl), or, in continuum's newest
# release, a mean over all tasks but two of best minus last, in which the stage before the last does not count: of two
# tasks it is 0 whatever happens. Best before the last minus last, as Chaudhry et al. define it (arXiv 1801.10112), is
# 6.67 here and what none of them says. continuum's backward transfer leaves out the newest old task, and its forward
# transfer is the mean below the diagonal; gmumcl's is how much better each task is learnt than the one before it. cl-gym
# takes the best from stages that were still to come, when it is asked in the middle of a run.
#
# Seen:
#   by definition: forgetting 6.67 BWT -3.33 FWT 16.67
#   avalanche-lib: forgetting 3.33
#   cl-gym: forgetting 11.67 after two tasks 30.00
#   continuum: forgetting 8.33 BWT -2.50 FWT 66.67 of two tasks 0.00
#   gmumcl: forgetting 11.67 BWT -3.33 FWT -10.00
# Needs: python3 (3.10 or newer), the network for pip (a few MB: the packages' dependencies are not installed).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" numpy==2.4.6 setuptools
"${pip[@]}" --no-deps --target "$work/packages" avalanche-lib==0.6.0 continuum==1.2.7 gmumcl==1.1.0
"${pip[@]}" --no-deps --target "$work/packages" cl-gym==1.0.3
cd "$work"
cat > measures.py <<'PYTHON'
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

A = np.array([[80.0, 40, 10, 95], [60, 70, 30, 20], [90, 50, 60, 30], [85, 40, 75, 50]])  # after stage, on task
BEFORE = np.array([0.0, 20, 20, 10])  # an untrained model, on each task


def module(path, name):
    """A file of a package by itself: the packages' own __init__ bring in what is not installed."""
    spec = importlib.util.spec_from_file_location(name, Path("packages") / path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def predictions(matrix):
    """For continuum, which counts: per stage the predictions, targets and tasks of 100 samples a task."""
    targets = np.zeros(100 * len(matrix), int)
    tasks = np.repeat(np.arange(len(matrix)), 100)
    given = [np.concatenate([np.arange(100) >= value for value in row]).astype(int) for row in matrix]
    return given, [targets] * len(matrix), [tasks] * len(matrix)


best = A[:-1].max(0, where=np.tri(4, dtype=bool)[:-1], initial=0)
print(f"by definition: forgetting {np.mean((best - A[-1])[:3]):.2f} BWT {np.mean((A[-1] - A.diagonal())[:3]):.2f} "
      f"FWT {np.mean(A.diagonal(1) - BEFORE[1:]):.2f}")

avalanche = module("avalanche/evaluation/functional.py", "functional")
print(f"avalanche-lib: forgetting {avalanche.forgetting(A)[-1][:3].mean():.2f}")


class Recorded:
    """What cl-gym's metrics are built on: accuracies by stage, task and epoch, the first two from 1."""

    def __init__(self, num_tasks, epochs_per_task):
        self.num_tasks = num_tasks
        self.data = np.zeros((num_tasks + 1, num_tasks + 1, epochs_per_task + 1))


for name in ("cl_gym", "cl_gym.utils"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["cl_gym.utils.metrics"] = types.SimpleNamespace(ContinualMetric=Recorded)
clgym = module("cl_gym/utils/metrics/forgetting.py", "cl_gym_forgetting").ForgettingMetric(4)
clgym.data[1:, 1:, -1] = np.tril(A)
print(f"cl-gym: forgetting {clgym.compute_final():.2f} after two tasks {clgym.compute(2):.2f}")

continuum = module("continuum/metrics/metrics.py", "continuum_metrics")
whole, two = predictions(A), predictions(np.array([[80.0, 0], [20, 90]]))
figures = [100 * measure(*whole) for measure in
           (continuum.forgetting, continuum.backward_transfer, continuum.forward_transfer)]
print("continuum: forgetting {:.2f} BWT {:.2f} FWT {:.2f}".format(*figures), f"of two tasks {100 * continuum.forgetting(*two):.2f}")

sys.modules["torch"] = types.ModuleType("torch")  # gmumcl's module names it for what is not called here
source = (Path("packages") / "gmumcl/cl/metrics.py").read_text()
begin = source.index("@dataclass\nclass AccuracyMatrix")
names = {}
exec("from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom typing import *\n" + source[begin:], names)
gmumcl = names["AccuracyMatrix"]([row.tolist() for row in A])
print(f"gmumcl: forgetting {gmumcl.forgetting():.2f} BWT {gmumcl.backward_transfer():.2f} FWT {gmumcl.forward_transfer():.2f}")
PYTHON
said=$("$work/venv/bin/python" measures.py)
echo "$said"
[ "$said" = "by definition: forgetting 6.67 BWT -3.33 FWT 16.67
avalanche-lib: forgetting 3.33
cl-gym: forgetting 11.67 after two tasks 30.00
continuum: forgetting 8.33 BWT -2.50 FWT 66.67 of two tasks 0.00
gmumcl: forgetting 11.67 BWT -3.33 FWT -10.00" ]
