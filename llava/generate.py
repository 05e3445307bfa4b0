"""Greedy answers, equal to those given one question at a time; what questions share is run once (see llava.prefix)."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from data.progress import say
from llava.ahead import Ahead
from llava.backbone import Backbone, unwrapped
from llava.conversation import encode_prompt, repeated
from llava.dataset import check_tokens
from llava.greedy import Decoder, fitting
from llava.prefix import Shared, may_pad, shared_prefixes

NO_MEMORY = "there is no memory for one question at a time; free the GPU ({})"


class UnreadablePicture(OSError):
    """The picture of question `number` cannot be opened."""

    def __init__(self, number: int, reason: OSError):
        super().__init__(str(reason))
        self.number = number


def encode_questions(backbone: Backbone, prompts: Sequence[str], images: Sequence[Path | None]) -> list[list[int]]:
    """Return the token ids that ask each question, whose text shows a picture where `images` has a path (`IMAGE` of
    data/records.py). Raises ValueError if a question and its picture do not go together."""
    counts = iter(backbone.picture_tokens(Path(), [str(image) for image in images if image]).tolist())
    found = []
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        try:
            ids = encode_prompt(backbone.vocabulary, prompt, 1)
        except ValueError as error:
            raise ValueError(f"question {number} ({prompt!r}): {error}") from error
        if (backbone.placeholder in ids) != (image is not None):
            raise ValueError(f"question {number} ({prompt!r}) and its picture {image} do not go together")
        found.append(ids if image is None else repeated(ids, backbone.placeholder, next(counts)))
    return found


@torch.no_grad()
def answer_batches(
    decoder: Decoder, ids: Sequence[list[int]], images: Sequence[Path | None], batch_size: int | None = None
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield, batch by batch, the numbers of questions and their stripped greedy answers; the longest come first.

    `ids` are those of `encode_questions`. At most `batch_size` questions are answered at once, by default as many as
    `llava.greedy.fitting` says; where memory runs out, half of them.
    Raises UnreadablePicture as soon as the other answers of its batch are yielded, ValueError if memory does not
    suffice for one question.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{batch_size} questions at once cannot be answered; give 1 or more, or leave it out")
    model, training = decoder.model, decoder.model.training
    model.eval()
    try:
        if decoder.backbone.generates:
            yield from _generated(decoder, ids, batch_size)
            return
        for shared in shared_prefixes(ids, images, decoder.backbone.placeholder):
            size = batch_size or fitting(decoder, len(ids[shared.groups[0][0]]) + decoder.max_new_tokens)
            for numbers, tokens in _answers(decoder, shared, ids, images, size):
                texts = decoder.backbone.tokenizer.batch_decode(tokens, True)
                yield numbers, [text.strip() for text in texts]
    finally:
        model.train(training)


def _generated(
    decoder: Decoder, ids: Sequence[list[int]], batch_size: int | None
) -> Iterator[tuple[list[int], list[str]]]:
    """As `answer_batches`, by transformers' own `generate`, of questions without pictures."""
    numbers = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
    tokenizer = decoder.backbone.tokenizer
    greedy = GenerationConfig(
        max_new_tokens=decoder.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=decoder.backbone.config.decoder_start_token_id,
    )
    model, most = unwrapped(decoder.model), batch_size
    own, model.generation_config = model.generation_config, greedy  # the base's would fill in beams and penalties
    try:
        while numbers:
            size = most or fitting(decoder, len(ids[numbers[0]]) + decoder.max_new_tokens)
            chosen = numbers[:size]
            try:
                answers = _generate(decoder, [ids[number] for number in chosen])
            except torch.OutOfMemoryError as error:
                if len(chosen) == 1:
                    raise ValueError(NO_MEMORY.format(error)) from error
                most = len(chosen) // 2
                say(f"out of memory; from here on at most {most} at once", file=sys.stderr)
                continue
            numbers = numbers[size:]
            yield chosen, answers
    finally:
        model.generation_config = own


def _generate(decoder: Decoder, ids: Sequence[list[int]]) -> list[str]:
    """The answers to one batch."""
    tokenizer, device = decoder.backbone.tokenizer, decoder.model.device
    rows = [torch.tensor(row) for row in ids]
    inputs = pad_sequence(rows, True, tokenizer.pad_token_id).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    real = (torch.arange(inputs.shape[1], device=device) < lengths[:, None]).long()
    with decoder.precision():
        output = decoder.model.generate(input_ids=inputs, attention_mask=real)
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def generate_answers(
    decoder: Decoder, prompts: Sequence[str], images: Sequence[Path | None], batch_size: int | None = None
) -> list[str]:
    """Return the stripped greedy answer to every question, in the order given; `prompts` as in `encode_questions`, the
    rest as in `answer_batches`. Raises what both raise."""
    ids, answers = encode_questions(decoder.backbone, prompts, images), [""] * len(prompts)
    for chosen, texts in answer_batches(decoder, ids, images, batch_size):
        for number, text in zip(chosen, texts, strict=True):
            answers[number] = text
    return answers


def _answers(
    decoder: Decoder, shared: Shared, ids: Sequence[list[int]], images: Sequence[Path | None], size: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield numbers and answers' tokens of the questions that share a prefix."""
    waiting = deque(shared.groups)
    paths = [image for group in waiting if (image := images[group[0]])]
    with Ahead(decoder.backbone.picture, paths, size) as pictures:
        while waiting:
            block = [waiting.popleft()]
            while waiting and sum(map(len, block)) + len(waiting[0]) <= size:
                block.append(waiting.popleft())
            opened, fault = _opened(decoder.backbone, block, ids, images, pictures)
            largest, answered = min(size, sum(map(len, opened.groups))), set()
            try:
                for numbers, tokens in _answer_block(decoder, shared.prefix, ids, opened, size):
                    answered.update(numbers)
                    yield numbers, tokens
            except torch.OutOfMemoryError as error:
                if largest == 1:
                    raise ValueError(NO_MEMORY.format(error)) from error
                size, fault = largest // 2, None
                rest = [[number for number in group if number not in answered] for group in block]
                waiting.extendleft(group for group in reversed(rest) if group)
                say(f"out of memory; from here on at most {size} at once", file=sys.stderr)
            if fault:
                raise fault


class Opened(NamedTuple):
    """Groups of questions, a group a picture, and what the model takes of their pictures; None without any."""

    groups: list[list[int]]
    pictures: list[dict[str, torch.Tensor]] | None


def _opened(
    backbone: Backbone,
    block: list[list[int]],
    ids: Sequence[list[int]],
    images: Sequence[Path | None],
    pictures: Ahead,
) -> tuple[Opened, UnreadablePicture | None]:
    """Return the groups whose picture could be opened, and what is wrong with another group's."""
    if images[block[0][0]] is None:
        return Opened(block, None), None
    found, fault = Opened([], []), None
    for group, picture in zip(block, pictures.take([images[group[0]] for group in block]), strict=True):
        try:
            seen = picture.result()
            check_tokens(backbone, seen, ids[group[0]].count(backbone.placeholder), images[group[0]])
            found.pictures.append(seen)
            found.groups.append(group)
        except OSError as error:
            fault = fault or UnreadablePicture(group[0], error)
    return found, fault


def _answer_block(
    decoder: Decoder, shared: list[int], ids: Sequence[list[int]], opened: Opened, size: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield numbers and answers' tokens of groups of questions that share a prefix, at most `size` at once."""
    if not opened.groups:
        return
    prefix = decoder.prefix(shared, opened.pictures)
    row_of = {number: row for row, group in enumerate(opened.groups) for number in group}
    batches = _batches(ids, list(row_of), size, may_pad(decoder.model))
    for batch in batches:
        start = prefix if batch is batches[-1] else prefix.copied()
        start.select([row_of[number] for number in batch])
        yield batch, decoder.answer(start, [ids[number][start.length :] for number in batch])


def _batches(ids: Sequence[list[int]], numbers: list[int], size: int, padded: bool) -> list[list[int]]:
    """Cut into parts of about equal size, at most `size`; unless `padded`, of questions of equal length."""
    if not padded:
        equal: dict[int, list[int]] = {}
        for number in numbers:
            equal.setdefault(len(ids[number]), []).append(number)
        return [batch for same in equal.values() for batch in _batches(ids, same, size, True)]
    count = -(-len(numbers) // size)
    width = -(-len(numbers) // count)
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]
