"""The frozen vision tower's output, computed once per picture and used in every epoch, stage and evaluation after that.

`stored_features` keeps it on the disk, <cache>/features/<checksum>.safetensors for each list of pictures, so that
runs, seeds and evaluation share it: mapped into memory, computed by whoever comes first. What is computed, and how a
model takes it in the place of pixels, is the backbone's matter.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.cache import cache_folder, make_once


class FeatureCache:
    """A tensor for every picture path, as rows of [pictures, ...]."""

    def __init__(self, paths: Sequence[Path], features: torch.Tensor):
        self._rows = {path: (features, row) for row, path in enumerate(paths)}

    def __or__(self, other: "FeatureCache") -> "FeatureCache":
        """The pictures of both."""
        whole = FeatureCache((), torch.empty(0))
        whole._rows = self._rows | other._rows
        return whole

    def __call__(self, path: Path) -> torch.Tensor:
        """Raises KeyError naming a picture that was not among the cached ones."""
        if path not in self._rows:
            raise KeyError(f"{path} is not among the {len(self._rows)} cached pictures; cache it before using it")
        features, row = self._rows[path]
        return features[row]


def stored_features(
    lists: Sequence[Sequence[Path]], tower: str, compute: Callable[[Sequence[Path]], torch.Tensor]
) -> FeatureCache:
    """Return the features of lists of pictures, each list a file of the cache.

    `compute` makes [pictures, ...] of paths; `tower` tells apart what computes otherwise. Processes that need the same
    lists at the same time share the work: what another one computes is waited for last.
    """
    found, waiting = FeatureCache((), torch.empty(0)), {}
    for paths in lists:
        distinct = list(dict.fromkeys(paths))
        if distinct:
            waiting[cache_folder() / "features" / f"{_name(tower, distinct)}.safetensors"] = distinct
    make_once(list(waiting), lambda file, partial: save_file({"features": compute(waiting[file])}, partial), _is_whole)
    for file, paths in waiting.items():
        found = found | FeatureCache(paths, _load(file))
    return found


def _load(file: Path) -> torch.Tensor:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("features")


def _is_whole(file: Path) -> bool:
    try:
        _load(file)
    except (FileNotFoundError, SafetensorError):
        return False
    return True


def _name(tower: str, paths: Sequence[Path]) -> str:
    """The name of the file with these pictures' features: it changes with a picture's size or time of change."""
    digest = hashlib.sha256(tower.encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
