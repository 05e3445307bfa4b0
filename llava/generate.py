"""Greedy answers in batches: sorted by length, padded on the left, equal to answering one question at a time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from data.pictures import load_image
from llava.conversation import encode_prompt
from llava.image import to_pixels
from llava.model import image_tokens


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
    batch_size: int,
    features: Callable[[Path], torch.Tensor] | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield, batch by batch, the numbers of questions and their stripped greedy answers; the longest come first.

    `ids` are those of `encode_questions`; `features` maps paths to cached vision features, if the model's tower was
    replaced by `llava.features.use_features`.
    """
    settings = _greedy(processor.tokenizer, model.config.image_token_id, max_new_tokens)
    dtype = model.get_output_embeddings().weight.dtype
    training = model.training
    model.eval()
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _batch([ids[number] for number in chosen], processor.tokenizer.pad_token_id, model.device)
        pictures = [images[number] for number in chosen if images[number]]
        if pictures:
            batch["pixel_values"] = _pictures(pictures, processor, features).to(model.device, dtype)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            output = model.generate(**batch, generation_config=settings)
        new = output[:, batch["input_ids"].shape[1] :]
        yield chosen, [text.strip() for text in processor.tokenizer.batch_decode(new, True)]
    model.train(training)


def generate_answers(
    model,
    processor,
    prompts: Sequence[str],
    images: Sequence[Path | None],
    max_new_tokens: int,
    batch_size: int,
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


def _greedy(tokenizer, image_id: int, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # The picture's placeholder has a row in the head but is no word (see llava.trainer.token_loss).
        suppress_tokens=[image_id],
    )


def _batch(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _pictures(paths: Sequence[Path], processor, features: Callable[[Path], torch.Tensor] | None) -> torch.Tensor:
    if features is not None:
        return torch.stack([features(path) for path in paths])
    return to_pixels(processor.image_processor, [load_image(path) for path in paths])
