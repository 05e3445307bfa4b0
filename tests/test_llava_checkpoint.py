"""The original layout: names both ways, the assembled model, and adapters trained by the original code."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import ORIGINAL, assemble_original
from safetensors.torch import save_file

from llava.checkpoint import (
    assemble,
    export_adapter,
    import_adapter,
    load_tokenizer,
    read_weights,
    to_original,
    to_transformers,
)
from llava.conversation import encode
from llava.dataset import Collator, InstructionDataset
from llava.model import attach_lora, image_tokens, load_base, save_adapter, trainable_parameters
from llava.trainer import supervised_logits, token_loss

TRAINING = json.loads((ORIGINAL / "lora_training.json").read_text())
NAMES = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": "model.vision_tower.pre_layrnorm.weight",
}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("name", NAMES)
def test_names_both_ways(name, prefix):
    assert to_transformers(prefix + name) == prefix + NAMES[name]
    assert to_original(prefix + NAMES[name]) == prefix + name


def test_every_name_of_the_model_comes_back(original):
    names = list(original.model.state_dict())
    assert [to_transformers(to_original(name)) for name in names] == names
    assert len({to_original(name) for name in names}) == len(names)


def test_weights_of_the_assembled_model_are_the_originals(original):
    state = original.model.state_dict()
    for name, tensor in read_weights(ORIGINAL / "vicuna-tiny").items():
        if "rotary_emb" not in name:
            assert torch.equal(state[to_transformers(name)][: len(tensor)], tensor)
    for name, tensor in read_weights(ORIGINAL / "mm_projector.bin").items():
        assert torch.equal(state[to_transformers(name)], tensor)


def test_saved_and_loaded_again_it_is_the_same_model(original, tmp_path):
    original.model.save_pretrained(tmp_path)
    original.processor.save_pretrained(tmp_path)
    model, processor = load_base(tmp_path, attn_implementation="sdpa")
    state = original.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert image_tokens(model.config) == 9
    turns = [("<image>", " x  y z"), ("  a</s> b\n", "é")]
    assert encode(processor.tokenizer, turns, 9, 999) == encode(original.processor.tokenizer, turns, 9, 999)
    samples = InstructionDataset(original.samples, processor, 9, 2048)
    assert torch.equal(samples[3]["pixel_values"], original.tensors["pixel_values_3"])


def batch_of(original, number):
    return Collator(0)([InstructionDataset(original.samples, original.processor, 9, 2048)[number]])


@pytest.mark.parametrize("number", range(4))
def test_recorded_loss(original, number):
    batch = batch_of(original, number)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs, targets = supervised_logits(original.model, batch, labels)
    loss = token_loss(outputs.logits, targets, original.model.config.image_token_id) / len(targets)
    assert loss.item() == pytest.approx(original.expected[number]["loss"], abs=1e-5)


def test_six_recorded_training_steps(original, tmp_path):
    model = attach_lora(assemble_original()[0], TRAINING["r"], TRAINING["alpha"], TRAINING["dropout"])
    start = import_adapter(ORIGINAL / "lora_init.bin")
    parameters = trainable_parameters(model)
    projector = [parameter for name, parameter in parameters.items() if "projector" in name]
    lora = [parameter for name, parameter in parameters.items() if "projector" not in name]
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_" in name:
                parameter.copy_(start.pop(name.replace(".default", "")))
    assert not start
    groups = [{"params": lora}, {"params": projector, "lr": TRAINING["lr_projector"]}]
    optimizer = torch.optim.AdamW(groups, lr=TRAINING["lr_lora"], weight_decay=0.0)
    model.train()
    for number, recorded in zip(TRAINING["order"], TRAINING["losses"], strict=True):
        batch = batch_of(original, number)
        labels = batch.pop("labels")
        outputs, targets = supervised_logits(model, batch, labels)
        loss = token_loss(outputs.logits, targets, model.config.image_token_id) / len(targets)
        assert loss.item() == pytest.approx(recorded, abs=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    save_adapter(model, tmp_path)
    ours = read_weights(tmp_path / "adapter_model.safetensors")
    files = [ORIGINAL / "lora-original" / name for name in ("adapter_model.bin", "non_lora_trainables.bin")]
    theirs = import_adapter(*files)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
    for exported, file in zip(export_adapter(ours), files, strict=True):
        assert exported.keys() == read_weights(file).keys()


def test_one_tensor_from_two_files_is_refused():
    with pytest.raises(ValueError, match=r"lora_init\.bin: .* already given"):
        import_adapter(ORIGINAL / "lora_init.bin", ORIGINAL / "lora_init.bin")


def test_shards_and_safetensors_read_as_one_file_does(tmp_path):
    whole = read_weights(ORIGINAL / "vicuna-tiny")
    names = sorted(whole)
    for shard, part in enumerate((names[:9], names[9:])):
        tensors = {name: whole[name] for name in part}
        torch.save(tensors, tmp_path / f"pytorch_model-{shard}-of-2.bin")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read_weights(tmp_path).items())
    save_file(whole, tmp_path / "model.safetensors")
    for shard in tmp_path.glob("*.bin"):
        shard.unlink()
    again = read_weights(tmp_path)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_weights(ORIGINAL)


def test_a_pickle_that_holds_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model.mm_projector.0.weight": Trap()}, tmp_path / "trap.bin")
    with pytest.raises(pickle.UnpicklingError):
        read_weights(tmp_path / "trap.bin")


def test_missing_weights_are_listed(tmp_path):
    projector = read_weights(ORIGINAL / "mm_projector.bin")
    projector["model.mm_projector.1.weight"] = projector.pop("model.mm_projector.2.weight")
    torch.save(projector, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="do not fit") as error:
        assemble(ORIGINAL / "vicuna-tiny", ORIGINAL / "clip-tiny-patch14-42", tmp_path / "mm_projector.bin")
    assert "model.multi_modal_projector.linear_2.weight" in str(error.value) and "mm_projector.1.weight" in str(
        error.value
    )


def test_tokenizer_that_is_not_legacy_has_a_space_only_at_the_beginning(tmp_path):
    folder = shutil.copytree(ORIGINAL / "vicuna-tiny", tmp_path / "vicuna")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}))
    modern, legacy = load_tokenizer(folder), load_tokenizer(ORIGINAL / "vicuna-tiny")
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer("a</s>b").input_ids) for tokenizer in (modern, legacy)]
    assert pieces == [["<s>", "▁a", "</s>", "b"], ["<s>", "▁a", "</s>", "▁b"]]
