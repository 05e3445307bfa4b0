"""Merging: the weights and logits of stock PEFT, whatever its configuration asks for, each sum rounded once."""

import json

import pytest
import torch
from conftest import make_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava.adapters import attach_lora, save_adapter, trainable_parameters
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.original.adapter import export_adapter_folder, merge
from llava.original.names import of_hub, read_weights

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": Llava15.lora_targets, "modules_to_save": list(Llava15.connector)}
VARIANTS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 9}},
    "ranks, rank-stabilised": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only", "target_modules": ["q_proj", "fc1", "linear_1"], "modules_to_save": None},
    "some linears": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["multi_modal_projector"]},
    "head whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "fan": {"fan_in_fan_out": True},
}  # fmt: skip


def trained(base, folder, settings, dtype=torch.float32, scale=0.1):
    """A folder of stock PEFT upon a base, whose every trained tensor was drawn anew."""
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(parameter + drawn.abs() if "magnitude" in name else drawn)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[1, 300, *[model.config.image_token_id] * 36, *range(259, 300)]])
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_stock_peft(tiny_base, tmp_path, name):
    adapter = trained(tiny_base, tmp_path / "adapter", PLAIN | VARIANTS[name])
    merge(tiny_base, adapter, tmp_path / "merged")
    plain, stock, whole = (LlavaForConditionalGeneration.from_pretrained(tiny_base) for _ in range(3))
    ours = logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"))
    beside = logits(PeftModel.from_pretrained(stock, adapter))
    merged = logits(PeftModel.from_pretrained(whole, adapter).merge_and_unload())
    assert (ours - logits(plain)).abs().max() > 0.1
    torch.testing.assert_close(ours, merged, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, beside, rtol=0, atol=1e-3)


def adapter_of(base, folder):
    model, _ = load_base(base)
    save_adapter(attach_lora(model, Llava15, 4, 6, 0.0), folder)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"target_parameters": ["lm_head.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"from_a_later_version": {"a": 1}}, "from_a_later_version"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": None}, "r should be a positive number"),
        ({"target_modules": None}, "does not fit the model"),
        ({"target_modules": ["nowhere"], "modules_to_save": None}, "does not fit the model"),
        ({"rank_pattern": {"q_proj": 2}}, "shape.*q_proj"),
        ({"modules_to_save": ["linear_1"]}, "unexpected.*linear_2"),
    ],
)
def test_what_merging_cannot_express_is_refused(tiny_base, tmp_path, change, named):
    adapter = adapter_of(tiny_base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"adapter_.*{named}"):
        merge(tiny_base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "lora_bias", "layers_to_transform", "rank_pattern"])
def test_the_original_layout_cannot_hold_variants(tiny_base, tmp_path, key):
    adapter = adapter_of(tiny_base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    export_adapter_folder(adapter, tmp_path / "out", tiny_base)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: [1]}))
    with pytest.raises(ValueError, match=f"not of the plain LoRA.*{key}"):
        export_adapter_folder(adapter, tmp_path / "again", tiny_base)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16])
def half(request, tmp_path_factory):
    """A base in half precision with a trained adapter in float32: (dtype, base, adapter)."""
    root = tmp_path_factory.mktemp("half")
    model, backbone = load_base(make_base(root / "whole"), request.param)
    model.save_pretrained(root / "base")
    backbone.processor.save_pretrained(root / "base")
    adapter = trained(root / "base", root / "adapter", PLAIN, request.param, 0.03) / "adapter_model.safetensors"
    tensors = load_file(adapter)  # PEFT writes the projector in the base's dtype, our training in float32
    tensors |= {name: torch.rand_like(t, dtype=torch.float32) for name, t in tensors.items() if "lora" not in name}
    save_file(tensors, adapter, {"format": "pt"})
    return request.param, root / "base", adapter.parent


def by_name(folder):
    return {of_hub(name): tensor for name, tensor in read_weights(folder).items()}


@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32])
def test_sums_are_rounded_once(half, tmp_path, wanted):
    """Within half a unit in the last place of the sum in float64, where two roundings go up to a whole one; everything
    else keeps its bits."""
    dtype, base, adapter = half
    merge(base, adapter, tmp_path, wanted)
    goal = wanted or dtype
    before, after, lora = (
        by_name(base),
        by_name(tmp_path),
        load_file(adapter / "adapter_model.safetensors"),
    )
    linears = 0
    for name, tensor in after.items():
        stem = f"base_model.model.{name.removesuffix('weight')}"
        if f"{stem}lora_A.weight" in lora:
            a, b = (lora[f"{stem}lora_{side}.weight"].double() for side in "AB")
            exact, linears = before[name].double() + b @ a * (6 / 4), linears + 1
            _, exponent = torch.frexp(exact)
            unit = torch.ldexp(torch.tensor(torch.finfo(goal).eps).double(), exponent - 1)
            noise = 2**-22 * exact.abs().max()  # of a sum in float32
            assert ((tensor.double() - exact).abs() <= unit / 2 + noise).all(), name
            if goal != torch.float32:
                agree = (tensor == exact.to(goal)).double().mean()
                assert agree > 0.999, (name, agree)
        else:
            given = lora.get(f"base_model.model.{name}", before[name])
            assert torch.equal(tensor, given.to(goal)), name
            assert ("projector" in name) == (given is not before[name])
        assert tensor.dtype == goal
    assert linears == 14


def test_parts_keep_their_dtypes(tiny_base, tmp_path):
    model, backbone = load_base(tiny_base)
    model.model.language_model.half(), model.lm_head.half()
    model.save_pretrained(tmp_path / "base")
    backbone.processor.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", adapter_of(tiny_base, tmp_path / "adapter"), tmp_path / "out")
    dtypes = {name: tensor.dtype for name, tensor in read_weights(tmp_path / "out").items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("language_model")} == {torch.float16}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("language_model")} == {torch.float32}


def test_a_sum_beyond_the_dtype_is_refused(half, tmp_path):
    _, base, adapter = half
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in lora:
        if "layers.1.self_attn.q_proj" in name:
            lora[name] = torch.full_like(lora[name], 1e30)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the sum of .*layers\.1\.self_attn\.q_proj\.weight"):
        merge(base, tmp_path / "adapter", tmp_path / "out")


def test_moelora_cannot_be_merged(tiny_base, tmp_path):
    from functools import partial

    from llaca.methods.moelora import expert_layer

    model, _ = load_base(tiny_base)
    model = attach_lora(model, Llava15, 4, 8, 0.0, partial(expert_layer(), experts=2))
    assert any("router" in name for name in trainable_parameters(model))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"unexpected.*lora_router"):
        merge(tiny_base, tmp_path / "adapter", tmp_path / "out")
