"""What questions share is run once: answers equal those of stock `generate` to one whole prompt at a time."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from data.pictures import load_image
from llava.backbones import load_base
from llava.backbones.llava15 import to_pixels
from llava.generate import UnreadablePicture, answer_batches, encode_questions
from llava.greedy import ON_CPU, Decoder, question_bytes
from llava.prefix import shared_prefixes

LENGTH = 8


def one_at_a_time(model, backbone, ids, images) -> tuple[list[str], list[int]]:
    """The oracle: stock `generate`, a whole prompt with its picture in a batch of one. Answers and their lengths."""
    ends = {"eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [model.config.image_token_id]}
    settings = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, **ends)
    answers, lengths = [], []
    for row, path in zip(ids, images, strict=True):
        more = {"pixel_values": to_pixels(backbone.processor.image_processor, [load_image(path)])} if path else {}
        inputs = torch.tensor([row])
        output = model.eval().generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=settings, **more
        )
        answers.append(backbone.tokenizer.decode(output[0, len(row) :], skip_special_tokens=True).strip())
        lengths.append(output.shape[1] - len(row))
    return answers, lengths


def in_batches(model, backbone, ids, images, batch_size) -> list[str]:
    answers = {}
    for numbers, texts in answer_batches(Decoder(model, backbone, LENGTH), ids, images, batch_size):
        assert len(numbers) <= (batch_size or ON_CPU) and not answers.keys() & set(numbers)
        answers.update(zip(numbers, texts, strict=True))
    return [answers[number] for number in range(len(ids))]


@pytest.fixture
def questions(tiny_base, tiny_data):
    """Model and backbone, and questions: four pictures with 1, 5, 2 and 3 of them, five without, in mixed order."""
    model, backbone = load_base(tiny_base)
    model.lm_head.weight.data[2] *= 1.5  # so that some answers end early
    images = [
        tiny_data / f"{number}.png" if number else None for number in (1, 2, 0, 2, 3, 4, 2, 0, 0, 4, 2, 3, 0, 4, 2, 0)
    ]
    prompts = [f"Is {'really ' * (3 * number % 7)}it {number}?" for number in range(len(images))]
    prompts = [f"<image>\n{prompt}" if image else prompt for prompt, image in zip(prompts, images, strict=True)]
    return model, backbone, encode_questions(backbone, prompts, images), images


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_questions_about_pictures_are_answered_as_single_ones(questions, attention):
    model, backbone, ids, images = questions
    model.set_attn_implementation(attention)
    single, _ = one_at_a_time(model, backbone, ids, images)
    assert len(set(single)) > 8 and len({len(text) for text in single}) > 3
    for batch_size in (None, 1, 2, 4, 7):
        assert in_batches(model, backbone, ids, images, batch_size) == single


def test_a_picture_and_what_is_shared_run_once(questions):
    model, backbone, ids, images = questions
    pictures, tokens = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: pictures.append(len(inputs[0])))
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    list(answer_batches(Decoder(model, backbone, 1), ids, images, 64))
    assert sum(pictures) == 4
    kinds = list(shared_prefixes(ids, images, model.config.image_token_id))
    assert [len(kind.groups) for kind in kinds] == [4, 1]
    rest = 0
    for prefix, groups in kinds:
        numbers = [number for group in groups for number in group]
        assert all(ids[number][: len(prefix)] == prefix for number in numbers)
        rest += len(groups) * len(prefix) + len(numbers) * (max(len(ids[number]) for number in numbers) - len(prefix))
    assert sum(tokens) == rest < sum(map(len, ids)) / 1.5


def test_a_question_leaves_its_batch_with_its_answer(questions):
    model, backbone, ids, images = questions
    (_, lengths), rows = one_at_a_time(model, backbone, ids, images), []
    assert min(lengths) < 3 and max(lengths) == LENGTH
    model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])) if given["input_ids"].shape[1] == 1 else None,
        with_kwargs=True,
    )
    list(answer_batches(Decoder(model, backbone, LENGTH), ids, images, 64))
    assert sum(rows) == sum(lengths) - len(lengths), "the first token of each comes with its question"


def test_where_the_picture_is_not_first_and_where_questions_are_equal(questions):
    model, backbone, ids, images = questions
    image_id = model.config.image_token_id
    picture = [image_id] * 36
    own = [
        [1, 300, *picture, 301, 302],
        [1, 305, 306, *picture, 301],
        [1, 300, *picture, 301, 302],
        [1, 300, *picture, 301],
    ]
    paths = [images[0], images[1], images[0], images[1]]
    assert in_batches(model, backbone, own, paths, 4) == one_at_a_time(model, backbone, own, paths)[0]
    kinds = {tuple(kind.prefix): kind.groups for kind in shared_prefixes(own, paths, image_id)}
    assert kinds == {(1, 300, *picture): [[0, 2], [3]], (1, 305, 306, *picture): [[1]]}
    [alike] = shared_prefixes([ids[2], ids[2]], [None, None], image_id)
    assert alike == (ids[2][:-1], [[0, 1]]), "a question keeps a token of its own"


def test_no_padding_stands_in_a_sliding_window(questions):
    model, backbone, ids, images = questions
    text = {key: getattr(model.config.text_config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    text = MistralConfig(**text, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, sliding_window=6,
                         initializer_range=0.2)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**{**model.config.to_dict(), "text_config": text})).eval()
    model.set_attn_implementation("eager")
    single, _ = one_at_a_time(model, backbone, ids, images)
    assert len(set(single)) > 8
    assert in_batches(model, backbone, ids, images, 8) == single


@pytest.mark.parametrize("fits", [5, 1])
def test_out_of_memory_halves_the_batch_and_loses_no_answer(questions, fits, capsys):
    model, backbone, ids, images = questions
    single, _ = one_at_a_time(model, backbone, ids, images)

    def small_memory(_, inputs):
        if len(inputs["input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(lambda module, _, given: small_memory(module, given), with_kwargs=True)
    assert in_batches(model, backbone, ids, images, None) == single
    assert "out of memory" in capsys.readouterr().err


def test_out_of_memory_in_the_middle_of_an_answer(questions, capsys):
    """After some batches of one picture are answered, and with words of the next already there."""
    model, backbone, ids, images = questions
    (single, _), calls = one_at_a_time(model, backbone, ids, images), Counter()

    def full(_, __, given):
        calls["all"] += 1
        if calls["all"] in (5, 20):
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(full, with_kwargs=True)
    assert in_batches(model, backbone, ids, images, 7) == single
    assert capsys.readouterr().err.count("out of memory") == 2


def test_no_memory_for_one_question_ends_with_the_remedy(questions):
    model, backbone, ids, images = questions

    def full(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    model.model.language_model.register_forward_pre_hook(full)
    with pytest.raises(ValueError, match=r"no memory for one question.* free the GPU .*2\.00 GiB"):
        list(answer_batches(Decoder(model, backbone, LENGTH), ids, images, 8))
    with pytest.raises(ValueError, match="0 questions at once"):
        list(answer_batches(Decoder(model, backbone, LENGTH), ids, images, 0))


def test_a_broken_picture_keeps_no_answer_of_its_batch_back(questions, tmp_path):
    model, backbone, ids, images = questions
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images[1]).read_bytes()[:60])
    asked = [broken if image == images[4] else image for image in images]
    given, batches = {}, answer_batches(Decoder(model, backbone, LENGTH), ids, asked, 64)
    with pytest.raises(UnreadablePicture, match=r"broken\.png cannot be read as a picture") as told:
        for numbers, texts in batches:
            given.update(zip(numbers, texts, strict=True))
    assert told.value.number in (4, 11)
    single, _ = one_at_a_time(model, backbone, ids, images)
    others = [number for number, image in enumerate(asked) if image not in (broken, None)]
    assert given == {number: single[number] for number in others}


def test_memory_of_a_question_counts_grouped_heads():
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    text = MistralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, **heads)
    assert question_bytes(text, 2, 10) == 10 * 2 * (2 * 3 * 2 * 16 + 3 * 96)
