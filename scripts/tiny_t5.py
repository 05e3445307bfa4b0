"""The tiny T5 of Dialog-mini: tokenizer, random weights, and how it learns, for scripts/pretrain_tiny.py.

`denoise` is T5's own pre-training (arXiv 1910.10683): spans of 15 % of a text's tokens, 3 on average, are told after a
mark for each. `first` is instruction tuning on simpler tasks than the stream's: what CITB calls initial multi-task
learning.
"""

import random
from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from data.mini.dialogues import FIRST, TASKS, story
from data.prepare.instructions import prompt
from scripts.tiny_families import Phase

PHASES = {"denoise": Phase(2500, lr=2e-3, batch=48), "first": Phase(3000, lr=1e-3, batch=48)}
NOISE, SPAN, MARKS = 0.15, 3.0, 16  # share of tokens, tokens of a span on average, spans of a text at most


def texts(rng: random.Random, count: int) -> list[str]:
    """All that is ever read or written, so many samples of each kind."""
    found = [story(rng) for _ in range(count)]
    for task in (*TASKS.values(), *FIRST.values()):
        for definition in task.definitions:
            for _ in range(count // 10):
                asked, said = task.make(rng)
                found += [prompt(definition, [], asked), said]
    return found


class TinyT5:
    """A T5 of 1.2 M parameters and a vocabulary of whole words."""

    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, instructions: Path) -> None:
        """Write the tokenizer: every word of the world is a piece, and so is every sign. `instructions` are those of
        pictures."""
        counts = Counter(word for text in texts(random.Random(0), 2000) for word in _words(text))
        signs = sorted({sign for word in counts for sign in word} - {"▁"})
        pieces = [(word, -2.0) for word in sorted(counts) if len(word) > 1] + [(sign, -8.0) for sign in ("▁", *signs)]
        tokenizer = T5TokenizerFast(
            vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], extra_ids=MARKS, model_max_length=512
        )
        tokenizer.save_pretrained(self.folder)

    def read(self) -> None:
        """Read what `write` wrote."""
        self.tokenizer = T5TokenizerFast.from_pretrained(self.folder)
        self.marks = self.tokenizer.convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(MARKS)])

    def model(self) -> T5ForConditionalGeneration:
        """One with random weights."""
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=128,
                d_kv=32,
                d_ff=384,
                num_layers=3,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=self.tokenizer.pad_token_id,
            )
        )
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        return model

    def load(self, folder: Path) -> T5ForConditionalGeneration:
        """A trained one."""
        return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    @staticmethod
    def finished(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
        """The same, to save."""
        return model.half()


def _words(text: str) -> list[str]:
    """A text's words as pieces, signs apart."""
    spaced = "".join(letter if letter.isalnum() or letter.isspace() else f" {letter} " for letter in text)
    return [f"▁{word}" if word.isalpha() else word for word in spaced.split()]


def corrupted(ids: list[int], marks: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """(what is left of a text, with a mark for every span that is gone; the spans, each behind its mark)."""
    gone = max(1, round(NOISE * len(ids)))
    spans = min(max(1, round(gone / SPAN)), len(marks) - 1, len(ids) - gone)
    lengths = _parts(gone, spans, rng)
    kept = _parts(len(ids) - gone, spans, rng)  # before each span; what follows the last one is taken from the first
    first, at = rng.randint(0, kept[0]), 0
    left, said = [], []
    for mark, before, length in zip(marks, [first, *kept[1:]], lengths, strict=False):
        left += [*ids[at : at + before], mark]
        said += [mark, *ids[at + before : at + before + length]]
        at += before + length
    return [*left, *ids[at:]], [*said, marks[spans]]


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """`count` random whole numbers from 1 whose sum is `total`."""
    cuts = sorted(rng.sample(range(1, total), count - 1))
    return [high - low for low, high in zip([0, *cuts], [*cuts, total], strict=True)]


class Batches:
    """Endless random batches of one rank, from `rng` as it is seeded."""

    def __init__(self, family: TinyT5):
        self.family, self.rng = family, random.Random()

    def draw(self, name: str) -> tuple[dict[str, torch.Tensor]]:
        """A batch of one of PHASES, as `Pretraining` takes it."""
        pairs = [getattr(self, name)() for _ in range(PHASES[name].batch)]
        pad, end = self.family.tokenizer.pad_token_id, self.family.tokenizer.eos_token_id
        asked, said = ([[*ids, end] for ids in side] for side in zip(*pairs, strict=True))
        ids = _padded(asked, pad)
        return ({"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": _padded(said, -100)},)

    def ids(self, text: str) -> list[int]:
        """A text's tokens without the end."""
        return self.family.tokenizer(text, add_special_tokens=False).input_ids

    def denoise(self) -> tuple[list[int], list[int]]:
        """A text with gaps, and what fills them."""
        return corrupted(self.ids(story(self.rng)), self.family.marks, self.rng)

    def first(self) -> tuple[list[int], list[int]]:
        """A simple task and its answer; one in five is a text with gaps."""
        if self.rng.random() < 0.2:
            return self.denoise()
        task = self.rng.choice(list(FIRST.values()))
        asked, said = task.make(self.rng)
        return self.ids(prompt(self.rng.choice(task.definitions), [], asked)), self.ids(said)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


class Pretraining(nn.Module):
    """The model as what a phase trains."""

    def __init__(self, model: T5ForConditionalGeneration, family: TinyT5):
        super().__init__()
        self.model = model

    def begin(self, name: str) -> set[int]:
        """All of it trains, and nothing sees."""
        return set()

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, language loss and 0)."""
        loss = self.model(**inputs, use_cache=False).loss
        return loss, torch.stack([loss.detach(), torch.zeros(())])
