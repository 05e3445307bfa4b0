"""Index lists of the original sampler.

The recorded mixed cases shuffled each modality with a generator that was not recorded, so there everything is checked
but that one draw: which picture meets which.
"""

import json
from pathlib import Path

import pytest
import torch

from llava import sampler
from llava.sampler import ModalityLengthSampler, modality_length_grouped_indices

CASES = json.loads((Path(__file__).parent / "golden" / "sampler.json").read_text())
MIXED = [case for case in CASES if min(case["lengths"]) < 0]
PLAIN = [case for case in CASES if min(case["lengths"]) > 0]


def generator(case):
    return torch.Generator().manual_seed(case["generator_seed"])


@pytest.mark.parametrize("case", PLAIN)
def test_recorded_indices_of_one_modality(case):
    indices = modality_length_grouped_indices(case["lengths"], case["batch_size"], case["world_size"], generator(case))
    assert indices == case["indices"]


@pytest.mark.parametrize("case", MIXED)
def test_recorded_indices_of_two_modalities_given_their_shuffles(case, monkeypatch):
    lengths, size = case["lengths"], case["batch_size"] * case["world_size"]
    counts = [sum(length > 0 for length in lengths), sum(length < 0 for length in lengths)]
    full = [(count - 1) // size for count in counts]
    order = torch.randperm(sum(full), generator=generator(case)).tolist()
    recorded = [case["indices"][order.index(k) * size :][:size] for k in range(sum(full))]
    rest = case["indices"][sum(full) * size :]

    def recorded_shuffle(sizes, *_):
        """The recorded order of one modality, as positions among its members."""
        picture = sizes == [length for length in lengths if length > 0]
        members = [index for index, length in enumerate(lengths) if (length > 0) == picture]
        chosen = recorded[: full[0]] if picture else recorded[full[0] :]
        flat = [index for megabatch in chosen for index in megabatch] + [index for index in rest if index in members]
        return [members.index(index) for index in flat]

    monkeypatch.setattr(sampler, "length_grouped_indices", recorded_shuffle)
    indices = modality_length_grouped_indices(lengths, case["batch_size"], case["world_size"], generator(case))
    assert indices == case["indices"]


@pytest.mark.parametrize("case", MIXED)
def test_recorded_megabatches_are_shared_out_alike(case):
    lengths, size = [abs(length) for length in case["lengths"]], case["batch_size"] * case["world_size"]
    complete = [case["indices"][start : start + size] for start in range(0, len(lengths), size)]
    for megabatch in complete[: sum(1 for batch in complete if len({case["lengths"][i] > 0 for i in batch}) == 1) - 1]:
        ranked = sorted(megabatch, key=lambda index: lengths[index], reverse=True)
        shared = sampler._share_out(ranked, lengths, case["world_size"])
        sizes = [lengths[index] for batch in shared for index in batch]
        assert sizes == [lengths[index] for index in megabatch]  # equal lengths may stand in either order


@pytest.mark.parametrize("case", MIXED)
def test_mixed_case_keeps_steps_of_one_modality_and_every_sample(case):
    lengths, size = case["lengths"], case["batch_size"] * case["world_size"]
    indices = modality_length_grouped_indices(lengths, case["batch_size"], case["world_size"], generator(case))
    assert sorted(indices) == list(range(len(lengths)))
    counts = [sum(length > 0 for length in lengths), sum(length < 0 for length in lengths)]
    full = sum((count - 1) // size for count in counts)
    for step in range(full):
        assert len({lengths[index] > 0 for index in indices[step * size : (step + 1) * size]}) == 1
    assert indices[full * size :] == sorted(indices[full * size :])


def test_epochs_differ_and_repeat_with_the_seed():
    first, again = (ModalityLengthSampler(CASES[0]["lengths"], 4, 2, seed=3) for _ in range(2))
    epoch_0 = list(first)
    first.set_epoch(1)
    assert list(first) != epoch_0 == list(again)
    assert list(ModalityLengthSampler(CASES[0]["lengths"], 4, 2, seed=4)) != epoch_0
    assert len(first) == 50


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="length zero"):
        modality_length_grouped_indices([3, 0, -2], 1, 1)
