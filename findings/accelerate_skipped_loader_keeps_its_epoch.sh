#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: set_epoch does not reach the sampler of a loader that skips batches for several processes.
#
# A training that goes on inside a later epoch skips the batches that are done (skip_first_batches) and sets the epoch, so
# that a sampler with an order of its own for each epoch goes on with the right records. With one process it does. With
# two, the skipping sampler stands around the one that shares batches out, which has no set_epoch: the call ends there
# without a word, and the rest of the epoch is drawn in the order of epoch 0. While nothing is skipped it arrives.
#
# Seen, epoch 3 of records 0 to 7 in batches of two, the first batch of this process skipped:
#   1 process: [[5, 6], [7, 0], [1, 2]]    2 processes: [[4, 5]], where [[7, 0]] is right
# Needs: python3 (3.10 or newer), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy
cd "$work"
cat > loaders.py <<'PYTHON'
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Sampler


class Turning(Sampler):
    """Begins with the record whose number is the epoch's."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __iter__(self):
        return iter([(record + self.epoch) % 8 for record in range(8)])


for processes in (1, 2):
    for skipped in (0, 1):
        loader = DataLoader(range(8), batch_size=2, sampler=Turning())
        loader = prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(3)
        print(processes, skipped, [batch.tolist() for batch in loader])
PYTHON
said=$("$work/venv/bin/python" loaders.py)
echo "$said"
[ "$said" = "1 0 [[3, 4], [5, 6], [7, 0], [1, 2]]
1 1 [[5, 6], [7, 0], [1, 2]]
2 0 [[3, 4], [7, 0]]
2 1 [[4, 5]]" ]
