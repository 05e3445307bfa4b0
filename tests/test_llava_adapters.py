"""What trains and what does not, and adapters that survive the disk."""

import json

import pytest
import torch
from conftest import ORIGINAL, make_base
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data.records import load_samples
from llava.adapters import (
    adapter_state,
    attach_lora,
    load_adapter,
    save_adapter,
    set_adapter_state,
    trainable_parameters,
)
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.dataset import Collator, InstructionDataset

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def scrambled(model, seed):
    """The model with every trainable tensor drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def attached(tiny):
    torch.manual_seed(0)
    return attach_lora(tiny[0], Llava15, 4, 8, 0.0)


def test_exactly_lora_on_the_language_model_and_the_projector_train(attached):
    layers = [f"layers.{layer}." for layer in range(2)]
    wanted = {
        f"base_model.model.model.language_model.{layer}{part}.{name}.lora_{side}.default.weight"
        for layer in layers
        for name in LINEARS
        for part in ("self_attn" if name[0] in "qkvo" else "mlp",)
        for side in "AB"
    } | {
        f"base_model.model.model.multi_modal_projector.{linear}.modules_to_save.default.{kind}"
        for linear in ("linear_1", "linear_2")
        for kind in ("weight", "bias")
    }
    assert set(trainable_parameters(attached)) == wanted


def test_gradients_reach_what_trains_and_nothing_else(attached, tiny, tiny_data):
    scrambled(attached, 1)
    backbone = tiny[1]
    samples = load_samples(tiny_data / "train.json", tiny_data)[:2]
    attached(**Collator(backbone)(list(InstructionDataset.of_samples(samples, backbone, 512)))).loss.backward()
    moved = {name for name, parameter in attached.named_parameters() if parameter.grad is not None}
    assert moved == set(trainable_parameters(attached))
    assert all(parameter.grad.abs().sum() > 0 for parameter in trainable_parameters(attached).values())


def test_fresh_adapters_change_nothing_and_train_in_float32(tiny_base):
    base, backbone = load_base(tiny_base, torch.bfloat16)
    ids = torch.tensor([backbone.tokenizer("USER: Is it?").input_ids])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = attach_lora(base, Llava15, 4, 8, 0.0).eval()
        assert torch.equal(model(input_ids=ids).logits, before)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_adapter_folder_round_trip(attached, tiny_base, tmp_path):
    scrambled(attached, 2)
    save_adapter(attached, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other = attach_lora(load_base(tiny_base)[0], Llava15, 4, 8, 0.0)
    load_adapter(other, tmp_path / "a")
    wanted, loaded = adapter_state(attached), adapter_state(other)
    assert wanted.keys() == loaded.keys() and all(torch.equal(wanted[name], loaded[name]) for name in wanted)


def test_stock_peft_reads_the_folder(attached, tiny_base, tmp_path):
    from peft import PeftModel

    scrambled(attached, 3).eval()
    save_adapter(attached, tmp_path)
    base, backbone = load_base(tiny_base)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([backbone.tokenizer("USER: <image>" + "<image>" * 35 + " Is it?").input_ids])
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=ids, pixel_values=pixels).logits for model in (stock, attached)))


def test_saving_twice_gives_the_same_bytes(attached, tmp_path):
    for name in ("a", "b"):
        save_adapter(attached, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_adapter_with_other_keys_shapes_or_rank_is_refused(attached, tiny_base, tmp_path):
    save_adapter(attached, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    gone, resized = sorted(state)[0], sorted(state)[5]
    broken = {name: tensor for name, tensor in state.items() if name != gone} | {"extra.weight": torch.zeros(1)}
    save_file(broken | {resized: torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_adapter(attached, tmp_path)
    for kind, name in (("missing", gone), ("unexpected", "extra.weight"), ("shape", resized)):
        assert f"'{kind}': ['{name}']" in str(error.value)
    for rank, alpha, message in ((2, 8, "r 4, the model 2"), (4, 16, "lora_alpha 8, the model 16")):
        with pytest.raises(ValueError, match=message):
            load_adapter(attach_lora(load_base(tiny_base)[0], Llava15, rank, alpha, 0.0), tmp_path)


def test_a_broken_adapter_is_not_saved_in_silence(attached, tmp_path):
    name, parameter = next(iter(trainable_parameters(attached).items()))
    with torch.no_grad():
        parameter[0] = torch.nan
    with pytest.raises(ValueError, match="non-finite") as error:
        save_adapter(attached, tmp_path)
    assert name.replace(".modules_to_save.default", "").replace(".default", "") in str(error.value)


def test_state_in_memory_is_a_copy_and_comes_back(attached):
    before = adapter_state(attached)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    scrambled(attached, 4)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    set_adapter_state(attached, before)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in trainable_parameters(attached).items())
    with pytest.raises(ValueError, match="missing"):
        set_adapter_state(attached, dict(list(before.items())[1:]))


def test_base_is_padded_and_checked(tiny_base, tmp_path):
    model, backbone = load_base(tiny_base)
    assert backbone.picture_tokens(tiny_base, ["a", "b"]).tolist() == [36, 36] and not model.training
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load_base(tmp_path / "nowhere")

    def variant(file, change):
        folder = tmp_path / f"{file}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in tiny_base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        return folder

    unpadded = variant("processor_config.json", lambda c: c["image_processor"].update(do_pad=False))
    assert load_base(unpadded)[1].processor.image_processor.do_pad
    cases = [
        ("config.json", lambda c: c.update(mm_projector_type="mlp2x_gelu"), "original LLaVA layout"),
        ("config.json", lambda c: c.update(image_token_index=7), "is not the tokenizer's token 7"),
        ("config.json", lambda c: c["text_config"].update(num_hidden_layers=3), r"do not fit.*layers\.2"),
        ("tokenizer_config.json", lambda c: c.update(pad_token=None), "needs a pad token"),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<s>"), "end of text is '<s>'"),
        (
            "processor_config.json",
            lambda c: c["image_processor"].update(crop_size={"height": 40, "width": 40}),
            "takes 48 x 48 pixels",
        ),
    ]
    for file, change, message in cases:
        with pytest.raises(ValueError, match=message):
            load_base(variant(file, change))
    stranger = variant("config.json", lambda c: None)
    tokenizer = AutoTokenizer.from_pretrained(ORIGINAL / "vicuna-tiny")
    assert "<image>" not in tokenizer.get_vocab()
    tokenizer.save_pretrained(stranger)
    with pytest.raises(ValueError, match="<image> is not the tokenizer's token"):
        load_base(stranger)
    (stranger / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_base(stranger)
    padded = make_base(tmp_path / "padded", padding=9)
    with pytest.raises(ValueError, match=r"model has \d+ words.*llava.checkpoint assemble"):
        load_base(padded)


# The sixteen values of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A random base whose widths are multiples of 64."""
    return make_base(tmp_path_factory.mktemp("wide"), width=64)


@pytest.mark.parametrize("kind", ["8bit", "nf4", "nf4-double"])
def test_quantized_base(wide_base, tiny_data, tmp_path, kind):
    """Each weight is the nearest on its grid, the rest is untouched, and LoRA trains upon it."""
    plain, backbone = load_base(wide_base)
    model, _ = load_base(wide_base, quantization=kind)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        exact = plain.get_submodule(name).weight.detach()
        if not (".language_model." in name and name.endswith(tuple(LINEARS))):
            assert torch.equal(module.weight, exact), name
            continue
        seen = module(torch.eye(exact.shape[1])).T
        if kind == "8bit":
            scale = exact.abs().amax(dim=1, keepdim=True) / 127
            torch.testing.assert_close(seen, (exact / scale).round() * scale, rtol=0, atol=1.1 * scale.max().item())
        else:
            tolerance = 0.01 if kind == "nf4" else 0.03  # bfloat16 inside; the grid's steps are 0.08 and more
            blocks = exact.reshape(-1, 64)
            scale = blocks.abs().amax(dim=1, keepdim=True)
            nearest = (blocks[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(dim=-1)
            grid = (torch.tensor(NF4)[nearest] * scale).view_as(exact)
            torch.testing.assert_close(seen, grid, rtol=0, atol=tolerance * scale.max().item())
    torch.manual_seed(0)
    model = scrambled(attach_lora(model, Llava15, 4, 8, 0.0), 1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    batch = Collator(backbone)(
        list(InstructionDataset.of_samples(load_samples(tiny_data / "train.json", tiny_data)[:2], backbone, 512))
    )
    losses = []
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    save_adapter(model, tmp_path)
    load_adapter(attach_lora(plain, Llava15, 4, 8, 0.0), tmp_path)  # an adapter like any other


def test_what_cannot_be_quantized_is_refused(tiny_base):
    with pytest.raises(ValueError, match="nf4 takes widths in multiples of 64"):
        load_base(tiny_base, quantization="nf4")
    with pytest.raises(ValueError, match="quantization is '3bit'"):
        load_base(tiny_base, quantization="3bit")
