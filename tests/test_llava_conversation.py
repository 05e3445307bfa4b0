"""Prompts, ids and labels against the original code's, recorded and re-derived by counting tokens as it did."""

import random
import re

import pytest
import sentencepiece
import torch

from data.records import IMAGE
from llava.backbones.llava15 import VICUNA
from llava.conversation import IGNORE, Vocabulary, encode, encode_prompt

SENTINEL = -200


def with_sentinel(ids, image_id):
    return [SENTINEL if token == image_id else token for token in ids]


@pytest.mark.parametrize("number", range(4))
def test_recorded_prompt_ids_and_labels(original, number):
    tokenizer, expected = original.processor.tokenizer, original.expected[number]
    turns, image_id = original.samples[number].turns, original.model.config.image_token_id
    encoded = encode(original.backbone.vocabulary, turns, picture_tokens=1, max_length=2048)
    assert VICUNA.layout(turns)[0] == expected["prompt"]
    assert with_sentinel(encoded.input_ids, image_id) == expected["input_ids"]
    assert encoded.labels == expected["labels"]
    supervised = [label for label in encoded.labels if label != IGNORE]
    assert " " + tokenizer.decode(supervised) == expected["supervised_text"]


@pytest.mark.parametrize("number", range(4))
def test_recorded_generation_prompt(original, number):
    expected, question = original.expected[number], original.samples[number].turns[0][0]
    ids = encode_prompt(original.backbone.vocabulary, question, picture_tokens=1)
    assert VICUNA.prompt(question) == expected["generation_prompt"]
    assert with_sentinel(ids, original.model.config.image_token_id) == expected["generation_prompt_ids"]


def test_image_tokens_repeat_in_place(original):
    vocabulary, turns = original.backbone.vocabulary, original.samples[1].turns
    one, nine = (encode(vocabulary, turns, picture_tokens=count, max_length=2048) for count in (1, 9))
    at = one.input_ids.index(original.model.config.image_token_id)
    assert nine.input_ids == one.input_ids[:at] + [one.input_ids[at]] * 9 + one.input_ids[at + 1 :]
    assert nine.labels == one.labels[:at] + [IGNORE] * 9 + one.labels[at + 1 :]


class Counting:
    """Labels as the released code finds them: by tokenising the rounds again and counting, on sentencepiece itself."""

    def __init__(self, folder):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "vicuna-tiny" / "tokenizer.model"))

    def plain(self, text):
        ids = [1]
        for part in re.split("(</s>)", text):
            ids += [2] if part == "</s>" else self.pieces.encode(part) if part else []
        return ids

    def ids(self, text):
        first, *others = [self.plain(part) for part in text.split(IMAGE)]
        return first + [token for other in others for token in [SENTINEL, *other[1:]]]

    def labels(self, text):
        ids = self.ids(text)
        labels, position = [IGNORE] * len(ids), 1
        for turn in text.split("</s>")[:-1]:
            question, _ = turn.split(" ASSISTANT: ")
            length = len(self.ids(turn))
            begin = position + len(self.ids(question + " ASSISTANT: ")) - 2
            labels[begin : position + length] = ids[begin : position + length]
            position += length
        assert position == len(ids)
        return labels


def random_text(rng, letters="abcdeABC  \n.,:é☃0123", shortest=1):
    text = "".join(rng.choice(letters) for _ in range(rng.randint(shortest, 25))).strip()
    return text or "x"


def test_random_conversations_equal_counting(original):
    rng, oracle, vocabulary = random.Random(0), Counting(original.folder), original.backbone.vocabulary
    image_id = original.model.config.image_token_id
    for _ in range(300):
        turns = [(random_text(rng), random_text(rng)) for _ in range(rng.randint(1, 4))]
        shown = rng.choice([None, 0, len(turns) - 1])
        if shown is not None:
            turns[shown] = (rng.choice(["", turns[shown][0]]) + IMAGE, turns[shown][1])
        encoded, text = encode(vocabulary, turns, 1, 2048), VICUNA.layout(turns)[0]
        assert with_sentinel(encoded.input_ids, image_id) == oracle.ids(text)
        assert encoded.labels == oracle.labels(text)
        prompt = encode_prompt(vocabulary, turns[0][0], 1)
        assert with_sentinel(prompt, image_id) == oracle.ids(VICUNA.prompt(turns[0][0]))


def test_added_token_tokenizer_supervises_the_answers(tiny):
    tokenizer = tiny[1].tokenizer
    turns = [("What is it?" + IMAGE, "[0.12, 0.34]"), ("And?", "no é\n2")]
    encoded = encode(tiny[1].vocabulary, turns, 36, 2048)
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(IMAGE)) == 36
    runs = "".join("x" if label != IGNORE else " " for label in encoded.labels).split()
    assert len(runs) == 2
    supervised = [label for label in encoded.labels if label != IGNORE]
    assert tokenizer.decode(supervised) == "[0.12, 0.34]</s> no é\n2</s>"


def test_a_picture_moves_to_the_front():
    assert VICUNA.prompt(f"  a b\n{IMAGE}").endswith(f"questions. USER: {IMAGE}\na b ASSISTANT:")
    assert VICUNA.prompt(IMAGE).endswith(f"USER: {IMAGE} ASSISTANT:")


def test_cut_keeps_the_beginning_and_refuses_to_lose_picture_or_answer(original):
    vocabulary, turns = original.backbone.vocabulary, original.samples[1].turns
    whole = encode(vocabulary, turns, 9, 2048)
    cut = encode(vocabulary, turns, 9, len(whole.labels) - 4)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-4], whole.labels[:-4])
    first = next(place for place, label in enumerate(whole.labels) if label != IGNORE)
    with pytest.raises(ValueError, match="no part of an answer"):
        encode(vocabulary, turns, 9, first)
    assert encode(vocabulary, turns, 9, first + 1).labels[-1] != IGNORE
    picture = whole.input_ids.index(original.model.config.image_token_id)
    with pytest.raises(ValueError, match="cuts the picture"):
        encode(vocabulary, turns, 9, picture + 8)


def test_tokenizer_without_image_token_is_refused(original):
    from transformers import LlamaTokenizer

    plain = LlamaTokenizer.from_pretrained(original.folder / "vicuna-tiny")
    with pytest.raises(ValueError, match="no <image> token"):
        Vocabulary.of(plain, VICUNA)


def test_an_answer_that_would_end_its_turn_early_is_refused(original):
    with pytest.raises(ValueError, match="cannot express"):
        encode(original.backbone.vocabulary, [("q", "dog</s>cat")], 1, 2048)


@pytest.mark.parametrize("number", range(4))
def test_recorded_logits(original, number):
    config = original.model.config
    sample = original.samples[number]
    encoded = encode(original.backbone.vocabulary, sample.turns, config.image_seq_length, 2048)
    pixels = {"pixel_values": original.tensors[f"pixel_values_{number}"][None]} if sample.image else {}
    with torch.no_grad():
        logits = original.model(input_ids=torch.tensor([encoded.input_ids]), **pixels).logits[0]
    vocabulary = config.image_token_id
    torch.testing.assert_close(logits[:, :vocabulary], original.tensors[f"logits_{number}"], rtol=0, atol=2e-5)
