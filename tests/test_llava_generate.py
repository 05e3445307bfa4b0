"""Greedy answers: those of the original code, in batches as one by one."""

import pytest
import torch

from llava.conversation import encode_prompt
from llava.generate import generate_answers
from llava.model import attach_lora, load_base


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_recorded_answers(original, batch_size):
    questions = [sample.turns[0][0] for sample in original.samples]
    images = [sample.image for sample in original.samples]
    answers = generate_answers(original.model, original.processor, questions, images, 12, batch_size)
    tokenizer = original.processor.tokenizer
    recorded = [tokenizer.decode(e["generated_ids"], skip_special_tokens=True).strip() for e in original.expected]
    assert answers == recorded


def test_batches_answer_as_single_questions_do(tiny, tiny_data):
    model, processor = tiny
    prompts = ["What?" + " really" * (number % 5) for number in range(9)]
    images = [tiny_data / f"{number}.png" if number % 3 else None for number in range(9)]
    prompts = [f"<image>\n{prompt}" if image else prompt for prompt, image in zip(prompts, images, strict=True)]
    single = generate_answers(model, processor, prompts, images, 10, 1)
    assert len(set(single)) > 1
    for batch_size in (2, 4, 9):
        assert generate_answers(model, processor, prompts, images, 10, batch_size) == single


def test_equals_the_stock_processor_and_generate_on_text(tiny):
    model, processor = tiny
    text = "Which is it?"
    [ours] = generate_answers(model, processor, [text], [None], 10, 1)
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {text} ASSISTANT:"
    )
    inputs = processor(text=prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    assert ours == processor.decode(output, skip_special_tokens=True).strip()


def test_end_of_text_ends_an_answer_and_the_placeholder_is_never_one(tiny):
    model, processor = tiny
    with torch.no_grad():
        model.lm_head.weight.zero_()
        ids = torch.tensor([encode_prompt(processor.tokenizer, "Is it?", 36)])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        rows, word = model.lm_head.weight, 300
        rows[model.config.image_token_id], rows[word], rows[2] = 3 * hidden, 2 * hidden, hidden
    assert generate_answers(model, processor, ["Is it?"], [None], 1, 1) == [processor.decode([300]).strip()] != [""]
    with torch.no_grad():
        rows[word] = 0
    assert generate_answers(model, processor, ["Is it?"], [None], 5, 1) == [""]


def test_bfloat16_base_with_float32_adapters(tiny_base, tiny_data):
    prompts, images = ["<image>\nWhat is it?", "Is it?"], [tiny_data / "4.png", None]
    model, processor = load_base(tiny_base, torch.bfloat16)
    plain = generate_answers(model, processor, prompts, images, 6, 2)
    adapted = attach_lora(model, 2, 4, 0.0)  # B is zero: nothing changes
    assert generate_answers(adapted, processor, prompts, images, 6, 2) == plain
    assert adapted.training  # as attach_lora left it


@pytest.mark.parametrize(("prompt", "picture"), [("<image>\nq", False), ("q", True)])
def test_question_and_picture_must_go_together(tiny, tiny_data, prompt, picture):
    with pytest.raises(ValueError, match=r"question 0 .*do not go together"):
        generate_answers(*tiny, [prompt], [tiny_data / "1.png" if picture else None], 2, 1)
