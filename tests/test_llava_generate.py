"""Greedy answers: those of the original code, in batches as one by one."""

import pytest
import torch

from llava.adapters import attach_lora
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.conversation import encode_prompt
from llava.generate import generate_answers
from llava.greedy import Decoder


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_recorded_answers(original, batch_size):
    questions = [sample.turns[0][0] for sample in original.samples]
    images = [sample.image for sample in original.samples]
    answers = generate_answers(Decoder(original.model, original.backbone, 12), questions, images, batch_size)
    tokenizer = original.processor.tokenizer
    recorded = [tokenizer.decode(e["generated_ids"], skip_special_tokens=True).strip() for e in original.expected]
    assert answers == recorded


def test_batches_answer_as_single_questions_do(tiny, tiny_data):
    model, backbone = tiny
    prompts = ["What?" + " really" * (number % 5) for number in range(9)]
    images = [tiny_data / f"{number}.png" if number % 3 else None for number in range(9)]
    prompts = [f"<image>\n{prompt}" if image else prompt for prompt, image in zip(prompts, images, strict=True)]
    single = generate_answers(Decoder(model, backbone, 10), prompts, images, 1)
    assert len(set(single)) > 1
    for batch_size in (2, 4, 9):
        assert generate_answers(Decoder(model, backbone, 10), prompts, images, batch_size) == single


def test_equals_the_stock_processor_and_generate_on_text(tiny):
    model, backbone = tiny
    text = "Which is it?"
    [ours] = generate_answers(Decoder(model, backbone, 10), [text], [None], 1)
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {text} ASSISTANT:"
    )
    inputs = backbone.processor(text=prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    assert ours == backbone.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_end_of_text_ends_an_answer_and_the_placeholder_is_never_one(tiny):
    model, backbone = tiny
    with torch.no_grad():
        model.lm_head.weight.zero_()
        ids = torch.tensor([encode_prompt(backbone.vocabulary, "Is it?", 36)])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        rows, word = model.lm_head.weight, 300
        rows[model.config.image_token_id], rows[word], rows[2] = 3 * hidden, 2 * hidden, hidden
    said = generate_answers(Decoder(model, backbone, 1), ["Is it?"], [None], 1)
    assert said == [backbone.tokenizer.decode([300]).strip()] != [""]
    with torch.no_grad():
        rows[word] = 0
    assert generate_answers(Decoder(model, backbone, 5), ["Is it?"], [None], 1) == [""]


def test_bfloat16_base_with_float32_adapters(tiny_base, tiny_data):
    prompts, images = ["<image>\nWhat is it?", "Is it?"], [tiny_data / "4.png", None]
    model, backbone = load_base(tiny_base, torch.bfloat16)
    plain = generate_answers(Decoder(model, backbone, 6), prompts, images, 2)
    adapted = attach_lora(model, Llava15, 2, 4, 0.0)  # B is zero: nothing changes
    assert generate_answers(Decoder(adapted, backbone, 6), prompts, images, 2) == plain
    assert adapted.training  # as attach_lora left it


@pytest.mark.parametrize(("prompt", "picture"), [("<image>\nq", False), ("q", True)])
def test_question_and_picture_must_go_together(tiny, tiny_data, prompt, picture):
    with pytest.raises(ValueError, match=r"question 0 .*do not go together"):
        generate_answers(Decoder(*tiny, 2), [prompt], [tiny_data / "1.png" if picture else None], 1)
