"""Batches of one modality and of similar lengths, drawn index for index as LLaVA-1.5 draws them.

A sample's length is positive with a picture and negative without. A megabatch holds the samples of one optimizer step
over all devices: `world_size` batches of `batch_size`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Return a permutation of the samples: random megabatches, each sorted by falling length and shared out evenly."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    indices = []
    for megabatch in _cut(order, world_size * batch_size):
        megabatch.sort(key=lambda index: lengths[index], reverse=True)
        for batch in _share_out(megabatch, lengths, world_size):
            indices += batch
    return indices


def modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Return a permutation of the samples in which every megabatch but the last is of one modality.

    The incomplete ends of both modalities are joined, in the data's order, into that last one. Samples of one modality
    alone are only grouped by length. Raises ValueError if a length is zero, which has no modality.
    """
    if not all(lengths):
        raise ValueError("a sample of length zero has no modality")
    pictures = [index for index, length in enumerate(lengths) if length > 0]
    texts = [index for index, length in enumerate(lengths) if length < 0]
    if not pictures or not texts:
        return length_grouped_indices(lengths, batch_size, world_size, generator)

    full, rest = [], []
    for members in (pictures, texts):
        sizes = [abs(lengths[index]) for index in members]
        grouped = [members[i] for i in length_grouped_indices(sizes, batch_size, world_size, generator)]
        *complete, last = _cut(grouped, world_size * batch_size)
        full += complete
        rest += last
    order = torch.randperm(len(full), generator=generator).tolist()
    return [index for number in order for index in full[number]] + sorted(rest)


class ModalityLengthSampler(Sampler[int]):
    """The indices of one epoch after another; each epoch is a function of the seed and its number alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int, seed: int):
        """`world_size` counts the batches of one optimizer step: devices times accumulation steps."""
        self.lengths, self.batch_size, self.world_size, self.seed = lengths, batch_size, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(modality_length_grouped_indices(self.lengths, self.batch_size, self.world_size, generator))


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _share_out(indices: list[int], lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Split `indices` into `shares` lists of equal count and nearly equal length; strided if they do not divide."""
    if len(indices) % shares:
        return [indices[first::shares] for first in range(shares)]
    batches, totals = [[] for _ in range(shares)], [0.0] * shares
    for index in indices:
        lightest = totals.index(min(totals))
        batches[lightest].append(index)
        totals[lightest] += lengths[index]
        if len(batches[lightest]) == len(indices) // shares:
            totals[lightest] = float("inf")
    return batches
