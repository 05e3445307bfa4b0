"""What questions about one picture share (system prompt, picture, first words), run through the model once for all.

Prefixes of equal tokens are rows of one cache without padding; pictures that take other numbers of tokens come apart by
that. All that is kept lies in the cache, except for the position of the next token: a picture may take fewer positions
than tokens, and how many tells its shape (`Backbone.positions_saved`). The caches are transformers' own.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import DynamicCache

from llava.backbone import Backbone


class Shared(NamedTuple):
    """Questions whose token ids begin alike: these ids, and the questions' numbers, a list a picture."""

    prefix: list[int]
    groups: list[list[int]]


def shared_prefixes(ids: Sequence[list[int]], images: Sequence, image_id: int | None) -> Iterator[Shared]:
    """Yield the questions by the prefix that they share, those with most tokens first.

    A prefix reaches at least to the picture's last token `image_id`, and on as far as all its questions are alike; it
    leaves every question one token. Questions without a picture are one group.
    """
    heads = defaultdict(list)
    for number, row in enumerate(ids):
        after_picture = len(row) - row[::-1].index(image_id) if image_id in row else 0
        heads[tuple(row[:after_picture])].append(number)
    for head, numbers in sorted(heads.items(), key=lambda item: len(item[0]), reverse=True):
        numbers.sort(key=lambda number: len(ids[number]), reverse=True)
        rests = [ids[number][len(head) :] for number in numbers]
        alike = rests[0][: min(_alike(min(rests), max(rests)), len(rests[-1]) - 1)]
        groups = defaultdict(list)
        for number in numbers:
            groups[images[number]].append(number)
        yield Shared([*head, *alike], list(groups.values()))


def _alike(left: list[int], right: list[int]) -> int:
    """How many of the first ids are equal. Of the least and the greatest of many lists: in all of them."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def may_pad(model) -> bool:
    """Whether padding may stand between prefix and question: a sliding window would count it."""
    return not any(DynamicCache(config=model.config).is_sliding)


def last_of(ids: torch.Tensor) -> torch.Tensor:
    """The positions whose logits are to be made: the last one. As a number, 1, it would be a slice, for which a linear
    layer takes a hundred times as long on a CPU (torch 2.13.0, bfloat16) as for the copy that an index makes."""
    return ids.new_tensor([-1])


@dataclass
class Prefix:
    """The key-value cache of a prefix of `length` tokens; a row a picture or a question. `next`: the position of the
    token behind it, int64 [rows]."""

    cache: DynamicCache
    length: int
    next: torch.Tensor

    @classmethod
    def of(cls, model, backbone: Backbone, ids: Sequence[int], pictures: Mapping[str, torch.Tensor], rows: int):
        """Run `ids` in so many rows, each with its own of the `pictures`, by the names of the model's arguments."""
        cache, inputs = DynamicCache(config=model.config), torch.tensor([ids], device=model.device).expand(rows, -1)
        more = {**backbone.beside_ids(inputs), **pictures} if pictures else {}
        model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=last_of(inputs), **more)
        follows = torch.full((rows,), len(ids), device=model.device)
        return cls(cache, len(ids), follows - backbone.positions_saved(pictures) if pictures else follows)

    def copied(self) -> "Prefix":
        """Return one to use up, for what is run behind a cache is written into it."""
        cache = copy.copy(self.cache)
        # A dynamic layer puts new tensors in the place of its own; it writes into none.
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        return replace(self, cache=cache)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, some perhaps several times."""
        if list(rows) != list(range(len(self.next))):
            chosen = torch.tensor(rows, device=self.next.device)
            self.cache.batch_select_indices(chosen)
            self.next = self.next[chosen]

    def positions(self, real: torch.Tensor) -> torch.Tensor:
        """Return the positions `[rows, tokens]` of tokens behind the prefix; `real` is 0 where one is padding."""
        return self.next[:, None] - 1 + real.cumsum(-1)
