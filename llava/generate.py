"""Greedy answers, equal to those given one question at a time; what questions share is run once (see llava.prefix)."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data.pictures import load_image
from llava.ahead import Ahead
from llava.conversation import encode_prompt
from llava.greedy import Decoder, fitting
from llava.image import to_pixels
from llava.model import image_tokens
from llava.prefix import Shared, may_pad, shared_prefixes


class UnreadablePicture(OSError):
    """The picture of question `number` cannot be opened."""

    def __init__(self, number: int, reason: OSError):
        super().__init__(str(reason))
        self.number = number


def encode_questions(config, tokenizer, prompts: Sequence[str], images: Sequence[Path | None]) -> list[list[int]]:
    """Return the token ids that ask each question. Raises ValueError if one and its picture do not go together."""
    count = image_tokens(config)
    ids = [encode_prompt(tokenizer, prompt, count) for prompt in tqdm(prompts, desc="tokenise", leave=False, delay=3)]
    for number, (tokens, image) in enumerate(zip(ids, images, strict=True)):
        if tokens.count(config.image_token_id) != (count if image else 0):
            raise ValueError(f"question {number} ({prompts[number]!r}) and its picture {image} do not go together")
    return ids


@torch.no_grad()
def answer_batches(
    model,
    processor,
    ids: Sequence[list[int]],
    images: Sequence[Path | None],
    max_new_tokens: int,
    batch_size: int | None = None,
    features: Callable[[Path], torch.Tensor] | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield, batch by batch, the numbers of questions and their stripped greedy answers; the longest come first.

    `ids` are those of `encode_questions`; `features` maps paths to cached vision features, if the model's tower was
    replaced by `llava.features.use_features`. At most `batch_size` questions are answered at once, by default as many
    as `llava.greedy.fitting` says; where memory runs out, half of them.
    Raises UnreadablePicture as soon as the other answers of its batch are yielded, ValueError if memory does not
    suffice for one question.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{batch_size} questions at once cannot be answered; give 1 or more, or leave it out")
    decoder, training = Decoder(model, processor.tokenizer, max_new_tokens), model.training
    read = features or partial(_pixels, processor.image_processor)
    model.eval()
    try:
        for shared in shared_prefixes(ids, images, model.config.image_token_id):
            size = batch_size or fitting(decoder, len(ids[shared.groups[0][0]]) + max_new_tokens)
            for numbers, tokens in _answers(decoder, shared, ids, images, size, read):
                yield numbers, [text.strip() for text in processor.tokenizer.batch_decode(tokens, True)]
    finally:
        model.train(training)


def generate_answers(
    model,
    processor,
    prompts: Sequence[str],
    images: Sequence[Path | None],
    max_new_tokens: int,
    batch_size: int | None = None,
    features: Callable[[Path], torch.Tensor] | None = None,
) -> list[str]:
    """Return the stripped greedy answer to every question, in the order given.

    `prompts` are questions, with `<image>` where `images` has a path. The rest as for `answer_batches`; raises what
    `encode_questions` raises.
    """
    ids, answers = encode_questions(model.config, processor.tokenizer, prompts, images), [""] * len(prompts)
    for chosen, texts in answer_batches(model, processor, ids, images, max_new_tokens, batch_size, features):
        for number, text in zip(chosen, texts, strict=True):
            answers[number] = text
    return answers


def _answers(
    decoder: Decoder, shared: Shared, ids: Sequence[list[int]], images: Sequence[Path | None], size: int, read: Callable
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield numbers and answers' tokens of the questions that share a prefix."""
    waiting = deque(shared.groups)
    paths = [image for group in waiting if (image := images[group[0]])]
    with Ahead(read, paths, size) as pictures:
        while waiting:
            block = [waiting.popleft()]
            while waiting and sum(map(len, block)) + len(waiting[0]) <= size:
                block.append(waiting.popleft())
            opened, pixels, fault = _opened(block, images, pictures)
            largest, answered = min(size, sum(map(len, opened))), set()
            try:
                for numbers, tokens in _answer_block(decoder, shared.prefix, ids, opened, pixels, size):
                    answered.update(numbers)
                    yield numbers, tokens
            except torch.OutOfMemoryError as error:
                if largest == 1:
                    raise ValueError(
                        f"there is no memory for one question at a time; free the GPU ({error})"
                    ) from error
                size, fault = largest // 2, None
                rest = [[number for number in group if number not in answered] for group in block]
                waiting.extendleft(group for group in reversed(rest) if group)
                tqdm.write(f"out of memory; from here on at most {size} at once", file=sys.stderr)
            if fault:
                raise fault


def _opened(
    block: list[list[int]], images: Sequence[Path | None], pictures: Ahead
) -> tuple[list[list[int]], torch.Tensor | None, UnreadablePicture | None]:
    """Return the groups whose picture could be opened, their pictures, and what is wrong with another group's."""
    if images[block[0][0]] is None:
        return block, None, None
    opened, pixels, fault = [], [], None
    for group, picture in zip(block, pictures.take([images[group[0]] for group in block]), strict=True):
        try:
            pixels.append(picture.result())
            opened.append(group)
        except OSError as error:
            fault = fault or UnreadablePicture(group[0], error)
    return opened, torch.stack(pixels) if pixels else None, fault


def _answer_block(
    decoder: Decoder,
    shared: list[int],
    ids: Sequence[list[int]],
    groups: list[list[int]],
    pixels: torch.Tensor | None,
    size: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield numbers and answers' tokens of groups of questions, a group a picture, at most `size` at once."""
    if not groups:
        return
    prefix = decoder.prefix(shared, pixels)
    row_of = {number: row for row, group in enumerate(groups) for number in group}
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


def _pixels(image_processor, path: Path) -> torch.Tensor:
    return to_pixels(image_processor, [load_image(path)])[0]
