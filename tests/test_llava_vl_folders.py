"""Folders of the families with pictures of any size: adapters, merged models, and what does not fit together."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_llava_vl import FAMILY, folders, pictures, samples_of  # noqa: F401
from vl_bases import make_vl

from llava.adapters import attach_lora, save_adapter, trainable_parameters
from llava.backbone import BaseOptions
from llava.backbones import blank_model, load_base, open_backbone
from llava.dataset import Collator, InstructionDataset
from llava.generate import generate_answers
from llava.greedy import Decoder


def test_what_a_family_does_not_have_is_refused_by_name(folders, tiny_base):  # noqa: F811
    with pytest.raises(ValueError, match="min_pixels, max_pixels: this base model's pictures have one size"):
        open_backbone(tiny_base, BaseOptions(max_pixels=100))
    model, backbone = load_base(folders["qwen3_vl"])
    with pytest.raises(ValueError, match=r"reuse_vision_features: .* leave it out"):
        backbone.vision(model)
    with pytest.raises(ValueError, match=r"it holds <\|image_pad\|>"):
        backbone.template.prompt("What is <|image_pad|>?")


@FAMILY
def test_a_folder_that_does_not_fit_together_is_refused_by_name(kind, tmp_path):
    folder = make_vl(tmp_path / "base", kind)
    settings = (folder / "preprocessor_config.json").read_text()
    old, new, message = ('"patch_size": 4', '"patch_size": 6', "the image processor has patch_size 6, the model 4")
    if kind == "internvl":
        old, new, message = ('"height": 16', '"height": 20', r"makes tiles of \(20, 16\) pixels, .* takes \(16, 16\)")
    assert old in settings
    (folder / "preprocessor_config.json").write_text(settings.replace(old, new))
    with pytest.raises(ValueError, match=message):
        open_backbone(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=r"config\.json"):
        open_backbone(folder)
    (folder / "preprocessor_config.json").write_text(settings)
    tokens = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(
        tokens.replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    )
    with pytest.raises(ValueError, match=r"turns end in <\|im_end\|> .* Instruct"):
        open_backbone(folder)


@FAMILY
def test_a_blank_model_has_the_shapes_of_a_loaded_one(folders, kind):  # noqa: F811
    blank, backbone = blank_model(folders[kind], torch.float32)
    whole, loaded = load_base(folders[kind])
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert backbone.connector == loaded.connector


@FAMILY
def test_a_tied_head_keeps_its_weights_under_lora_and_merge(kind, pictures, tmp_path):  # noqa: F811
    """PEFT would add an adapter on a tied head twice; none is put there."""
    folder = make_vl(tmp_path / "base", kind, tied=True)
    model, backbone = load_base(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = model.lm_head.weight.detach().clone()
    model = attach_lora(model, backbone, 4, 8, 0.0).eval()
    assert not any("lm_head" in name or "embed" in name for name in trainable_parameters(model))
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures)[:2], backbone, 512)))
    batch.pop("labels")
    save_adapter(model, tmp_path / "adapter")
    backbone.merge(folder, tmp_path / "adapter", tmp_path / "merged", None)
    merged, _ = load_base(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight and torch.equal(merged.lm_head.weight, before)
    head = get_peft_model(load_base(folder)[0], LoraConfig(r=2, target_modules=["lm_head"]))
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"shares with its embedding: .*lm_head"):
        backbone.merge(folder, tmp_path / "head", tmp_path / "never", None)


@FAMILY
def test_an_adapter_opens_with_stock_peft_and_merges(folders, pictures, kind, tmp_path):  # noqa: F811
    model, backbone = load_base(folders[kind])
    torch.manual_seed(1)
    model = attach_lora(model, backbone, 4, 8, 0.0).eval()
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    save_adapter(model, tmp_path / "adapter")
    base = Path(shutil.copytree(folders[kind], tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(b"the base's own, in another format")
    backbone.merge(base, tmp_path / "adapter", tmp_path / "merged", None)
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    told = [(folder / "generation_config.json").read_text() for folder in (base, tmp_path / "merged")]
    assert told[0] == told[1]
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures), backbone, 512)))
    batch.pop("labels")
    stock = PeftModel.from_pretrained(load_base(folders[kind])[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted, opened = model(**batch).logits, stock(**batch).logits
    torch.testing.assert_close(opened, wanted, atol=2e-5, rtol=2e-5)
    asked, images = ["<image>\nWhat?", "<image>\nWhat is it?", "Who?"], [*pictures[:2], None]
    merged, reader = load_base(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    answers = generate_answers(Decoder(model, backbone, 6), asked, images)
    assert generate_answers(Decoder(merged, reader, 6), asked, images) == answers
