"""Cached vision features against the stock tower they stand for."""

import pytest
import torch
from conftest import make_base

from data.records import load_samples
from llava.dataset import Collator, InstructionDataset
from llava.features import cache_features, use_features
from llava.generate import generate_answers
from llava.model import attach_lora, load_base


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]])
@pytest.mark.parametrize("lora", [False, True])
def test_logits_equal_those_of_the_tower(tmp_path, tiny_data, layer, lora):
    model, processor = load_base(make_base(tmp_path, layer))
    if lora:
        model = attach_lora(model, 2, 4, 0.0).eval()
    samples = load_samples(tiny_data / "train.json", tiny_data)
    chosen, collate = [samples[n] for n in (0, 11, 4, 3)], Collator(processor.tokenizer.pad_token_id)
    paths = [sample.image for sample in samples if sample.image]
    cache = cache_features(model, processor.image_processor, paths + paths[:2], batch_size=3)
    pixels, features = (
        collate(list(InstructionDataset(chosen, processor, 36, 512, features))) for features in (None, cache)
    )
    with torch.no_grad():
        stock = model(**pixels).logits
        use_features(model)
        cached = model(**features).logits
    torch.testing.assert_close(cached, stock, rtol=0, atol=1e-6)


def test_answers_equal_those_of_the_tower(tiny, tiny_data):
    model, processor = tiny
    images = [tiny_data / "4.png", None, tiny_data / "8.png"]
    prompts = ["<image>\nWhat is it?", "Is it?", "<image>\nWhat?"]
    cache = cache_features(model, processor.image_processor, [path for path in images if path])
    stock = generate_answers(model, processor, prompts, images, 8, 2)
    use_features(model)
    assert generate_answers(model, processor, prompts, images, 8, 2, cache) == stock


def test_errors_name_what_is_missing(tiny, tiny_data):
    model, processor = tiny
    cache = cache_features(model, processor.image_processor, [tiny_data / "4.png"])
    with pytest.raises(KeyError, match=r"5\.png is not among the 1 cached"):
        cache(tiny_data / "5.png")
    use_features(model)
    with pytest.raises(ValueError, match=r"cached features .* expected, got"):
        model.model.vision_tower(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match="already replaced"):
        cache_features(model, processor.image_processor, [tiny_data / "5.png"])
