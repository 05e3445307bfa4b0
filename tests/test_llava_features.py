"""Cached vision features against the stock tower they stand for."""

import pytest
import torch
from conftest import make_base

from data.records import load_samples
from llava.adapters import attach_lora
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.dataset import Collator, InstructionDataset
from llava.generate import generate_answers
from llava.greedy import Decoder


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]])
@pytest.mark.parametrize("lora", [False, True])
def test_logits_equal_those_of_the_tower(tmp_path, tiny_data, monkeypatch, layer, lora):
    model, backbone = load_base(make_base(tmp_path, layer))
    if lora:
        model = attach_lora(model, Llava15, 2, 4, 0.0).eval()
    samples = load_samples(tiny_data / "train.json", tiny_data)
    chosen, collate = [samples[n] for n in (0, 11, 4, 3)], Collator(backbone)
    paths = [sample.image for sample in samples if sample.image]
    monkeypatch.setattr("llava.backbones.llava15.AT_ONCE", 3)
    features = backbone.vision_features(model, [paths + paths[:2]])
    records = InstructionDataset.of_samples(chosen, backbone, 512)
    with torch.no_grad():
        stock = model(**collate(list(records))).logits
        backbone.use_features(model, features)
        cached = model(**collate(list(records))).logits
    torch.testing.assert_close(cached, stock, rtol=0, atol=1e-6)


def test_answers_equal_those_of_the_tower(tiny, tiny_data):
    model, backbone = tiny
    images = [tiny_data / "4.png", None, tiny_data / "8.png"]
    prompts = ["<image>\nWhat is it?", "Is it?", "<image>\nWhat?"]
    features = backbone.vision_features(model, [[path for path in images if path]])
    stock = generate_answers(Decoder(model, backbone, 8), prompts, images, 2)
    backbone.use_features(model, features)
    assert generate_answers(Decoder(model, backbone, 8), prompts, images, 2) == stock


def test_errors_name_what_is_missing(tiny, tiny_data):
    model, backbone = tiny
    features = backbone.vision_features(model, [[tiny_data / "4.png"]])
    backbone.use_features(model, features)
    with pytest.raises(KeyError, match=r"5\.png is not among the 1 cached"):
        backbone.picture(tiny_data / "5.png")
    with pytest.raises(ValueError, match=r"cached features .* expected, got"):
        model.model.vision_tower(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match="already replaced"):
        backbone.vision_features(model, [[tiny_data / "5.png"]])
