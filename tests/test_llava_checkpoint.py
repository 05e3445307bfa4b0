"""The original layout: names both ways, the assembled model, and adapters trained by the original code."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ORIGINAL, assemble_original
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava.adapters import attach_lora, save_adapter, trainable_parameters
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.conversation import encode
from llava.dataset import Collator, InstructionDataset
from llava.original.adapter import export_adapter, import_adapter, import_adapter_folder, merge
from llava.original.base import disassemble, read_base, write_base
from llava.original.names import load_tokenizer, read_weights, to_hub, to_original, to_transformers

VICUNA, CLIP = ORIGINAL / "vicuna-tiny", ORIGINAL / "clip-tiny-patch14-42"
PROJECTOR_FILE, LORA = ORIGINAL / "mm_projector.bin", ORIGINAL / "lora-original"
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


def assert_same(found, wanted):
    """Names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def run(*arguments) -> int:
    """The command line, in a process of its own as users start it; its standard error goes to ours."""
    line = [sys.executable, "-m", "llava.checkpoint", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    return done.returncode


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
    model, backbone = load_base(tmp_path, attn_implementation="sdpa")
    state = original.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert backbone.picture_tokens(tmp_path, ["a"]).tolist() == [9]
    turns = [("<image>", " x  y z"), ("  a</s> b\n", "é")]
    assert encode(backbone.vocabulary, turns, 9, 999) == encode(original.backbone.vocabulary, turns, 9, 999)
    samples = InstructionDataset.of_samples(original.samples, backbone, 2048)
    assert torch.equal(samples[3]["pixel_values"], original.tensors["pixel_values_3"])


def batch_of(original, number):
    records = InstructionDataset.of_samples(original.samples, original.backbone, 2048)
    return Collator(original.backbone)([records[number]])


@pytest.mark.parametrize("number", range(4))
def test_recorded_loss(original, number):
    batch = batch_of(original, number)
    with torch.no_grad():
        outputs, targets = original.backbone.answer_logits(original.model, batch)
    loss = original.backbone.token_loss(outputs.logits, targets) / len(targets)
    assert loss.item() == pytest.approx(original.expected[number]["loss"], abs=1e-5)


def test_six_recorded_training_steps(original, tmp_path):
    model = attach_lora(assemble_original()[0], Llava15, TRAINING["r"], TRAINING["alpha"], TRAINING["dropout"])
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
        outputs, targets = original.backbone.answer_logits(model, batch)
        loss = original.backbone.token_loss(outputs.logits, targets) / len(targets)
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
    with pytest.raises(ValueError, match=r"trap\.bin holds something else than tensors"):
        read_weights(tmp_path / "trap.bin")
    torch.save({"model.mm_projector.0.weight": 3.0}, tmp_path / "number.bin")
    with pytest.raises(ValueError, match=r"number\.bin should hold tensors by name"):
        read_weights(tmp_path / "number.bin")


def test_missing_weights_are_listed(tmp_path):
    projector = read_weights(ORIGINAL / "mm_projector.bin")
    projector["model.mm_projector.1.weight"] = projector.pop("model.mm_projector.2.weight")
    torch.save(projector, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="does not fit") as error:
        read_base(VICUNA, CLIP, tmp_path / "mm_projector.bin")
    assert "model.multi_modal_projector.linear_2.weight" in str(error.value) and "mm_projector.1.weight" in str(
        error.value
    )


def test_a_cut_off_file_and_a_missing_shard_are_named(tmp_path):
    for suffix in ("bin", "safetensors"):
        file = tmp_path / f"weights.{suffix}"
        (torch.save if suffix == "bin" else save_file)({"a": torch.ones(5000)}, file)
        file.write_bytes(file.read_bytes()[:9000])
        with pytest.raises(ValueError, match=rf"weights\.{suffix} is cut off"):
            read_weights(file)
    index = {"weight_map": {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model-1-of-2.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-2-of-2\.bin"):
        read_weights(tmp_path)


def test_a_projector_of_another_size_is_refused(tmp_path):
    projector = read_weights(ORIGINAL / "mm_projector.bin")
    projector["model.mm_projector.2.weight"] = projector["model.mm_projector.2.weight"][:40]
    torch.save(projector, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"leads from 48 to 40, .* widths 48 and 64"):
        read_base(VICUNA, CLIP, tmp_path / "mm_projector.bin")


def test_base_round_trip(original, tmp_path):
    """Original parts, our folder, original parts: every bit, and stock transformers opens what lies between."""
    write_base(read_base(VICUNA, CLIP, PROJECTOR_FILE), tmp_path / "ours")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="sdpa")
    assert_same(model.state_dict(), original.model.state_dict())
    assert LlavaProcessor.from_pretrained(tmp_path / "ours").image_processor.do_pad
    disassemble(tmp_path / "ours", tmp_path / "parts")
    language = {name: t for name, t in read_weights(VICUNA).items() if "rotary_emb" not in name}
    assert_same(read_weights(tmp_path / "parts" / "llm"), language)
    assert_same(read_weights(tmp_path / "parts" / "mm_projector.bin"), read_weights(PROJECTOR_FILE))
    vision = {name: t for name, t in read_weights(CLIP).items() if not name.endswith("position_ids")}
    assert_same(read_weights(tmp_path / "parts" / "vision"), vision)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(VICUNA / name, tmp_path / "parts" / "llm")
    again = read_base(*(tmp_path / "parts" / part for part in ("llm", "vision", "mm_projector.bin")))
    assert_same(again.state, original.model.state_dict())


def test_every_part_keeps_its_dtype_unless_told(tmp_path):
    base = read_base(VICUNA, CLIP, PROJECTOR_FILE)
    half = {name: t.half() if "language_model" in name or "lm_head" in name else t for name, t in base.state.items()}
    write_base(base._replace(state=half), tmp_path / "mixed")
    assert_same({name: read_weights(tmp_path / "mixed")[to_hub(name)] for name in half}, half)
    write_base(base, tmp_path / "half", torch.bfloat16)
    assert {tensor.dtype for tensor in read_weights(tmp_path / "half").values()} == {torch.bfloat16}
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_whole_llava_checkpoint(original, tmp_path):
    """All weights in one file with the original config.json, whose model_type is transformers' own."""
    state = {to_original(name): tensor for name, tensor in original.model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:-1]
    shutil.copytree(VICUNA, tmp_path / "llava")
    torch.save(state, tmp_path / "llava" / "pytorch_model.bin")
    shutil.copy(ORIGINAL / "original_config.json", tmp_path / "llava" / "config.json")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["model_type"] == "llava"
    base = read_base(tmp_path / "llava", CLIP)
    assert_same(base.state, original.model.state_dict())
    assert base.config.vision_feature_layer == -2
    with pytest.raises(ValueError, match="holds a projector of its own: leave out --projector"):
        read_base(tmp_path / "llava", CLIP, PROJECTOR_FILE)
    with pytest.raises(ValueError, match="give the CLIP folder as --vision"):
        read_base(tmp_path / "llava")
    without = {name: tensor for name, tensor in state.items() if "vision_tower" not in name}
    torch.save(without, tmp_path / "llava" / "pytorch_model.bin")
    assert_same(read_base(tmp_path / "llava", CLIP).state, original.model.state_dict())


def test_an_export_of_llava_hf(original, tmp_path):
    """Its own placeholder and pad token, rows up to a multiple of 64: they go, and the numbers are the original's."""
    base = read_base(VICUNA, CLIP, PROJECTOR_FILE)
    state, config = dict(base.state), base.config
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name][:-1], torch.ones(64, state[name].shape[1])])
    tokenizer = base.processor.tokenizer
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    config.text_config.vocab_size = len(state["lm_head.weight"])
    config.pad_token_id = tokenizer.pad_token_id
    write_base(base._replace(state=state), tmp_path)
    shutil.copy(VICUNA / "tokenizer.model", tmp_path)
    base = read_base(tmp_path)
    assert_same(base.state, original.model.state_dict())
    assert base.config.text_config.vocab_size == 601 and len(base.processor.tokenizer) == 601
    turns = [("<image>\nWhat is it?", "a dog"), ("  x</s>", "é")]
    own = Llava15(base.config, base.processor).vocabulary
    assert encode(own, turns, 9, 999) == encode(original.backbone.vocabulary, turns, 9, 999)
    with pytest.raises(ValueError, match="leave out --vision and --projector"):
        read_base(tmp_path, CLIP, PROJECTOR_FILE)


def test_a_clip_folder_with_its_text_half(original, tmp_path):
    """As openai/clip-vit-large-patch14-336 is."""
    vision = CLIPVisionConfig.from_pretrained(CLIP)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict()))
    assert not clip.load_state_dict(read_weights(CLIP), strict=False).unexpected_keys
    clip.save_pretrained(tmp_path)
    shutil.copy(CLIP / "preprocessor_config.json", tmp_path)
    assert_same(read_base(VICUNA, tmp_path, PROJECTOR_FILE).state, original.model.state_dict())


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """The original's base as a folder of ours."""
    folder = tmp_path_factory.mktemp("assembled")
    write_base(read_base(VICUNA, CLIP, PROJECTOR_FILE), folder)
    return folder


def test_adapter_round_trip_by_the_commands(assembled, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run("import-adapter", "--from", LORA, "--out", ours, "--base", assembled) == 0
    assert run("export-adapter", "--from", ours, "--out", theirs) == 0
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        assert_same(read_weights(theirs / name), read_weights(LORA / name))
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (LORA, theirs))
    same = ("r", "lora_alpha", "lora_dropout", "bias", "peft_type", "target_modules", "modules_to_save", "task_type")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (LORA, theirs))
    kept = [key for key in before if key.startswith("mm_")] + ["vocab_size", "hidden_size", "image_aspect_ratio"]
    kept.remove("mm_vision_tower")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


def test_imported_adapter_opens_with_stock_peft_and_merges(assembled, original, tmp_path):
    import_adapter_folder(LORA, tmp_path / "adapter", assembled)
    stock = LlavaForConditionalGeneration.from_pretrained(assembled)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    merge(assembled, tmp_path / "adapter", tmp_path / "merged")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    plain = LlavaForConditionalGeneration.from_pretrained(assembled).eval()
    moved = 0.0
    for number in range(4):
        batch = batch_of(original, number)
        del batch["labels"]
        with torch.no_grad():
            a, b, c = (model(**batch).logits for model in (adapted, merged, plain))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        moved = max(moved, (a - c).abs().max().item())
        texts = [model.generate(**batch, do_sample=False, max_new_tokens=8).tolist() for model in (adapted, merged)]
        assert texts[0] == texts[1]
    assert moved > 1e-2


def test_an_adapter_of_another_kind_or_shape_is_refused(assembled, tmp_path):
    folder = shutil.copytree(LORA, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())

    def refused(change, message, base=None):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            import_adapter_folder(folder, tmp_path / "out", base)

    refused({"peft_type": "MOE_LORA_CoIN", "expert_num": 2}, "not of the plain LoRA")
    refused({"bias": "all"}, "not of the plain LoRA")
    refused({"r": 8}, "'shape'")
    refused({"r": 8}, "'shape'", assembled)
    lora = read_weights(folder / "adapter_model.bin")
    first, *_ = sorted(lora)
    lora["base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight"] = lora.pop(first)
    torch.save(lora, folder / "adapter_model.bin")
    refused({"dema": True}, r"'missing'.*'unexpected'.*x_proj")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        import_adapter_folder(folder, tmp_path / "out")


def test_commands_end_in_one_clear_line(tmp_path, capsys):
    assert run("assemble", "--llm", VICUNA, "--vision", CLIP, "--out", tmp_path) != 0
    assert "give mm_projector.bin as --projector" in capsys.readouterr().err
    assert run("assemble", "--llm", tmp_path / "nowhere", "--out", tmp_path) != 0
    assert "nowhere/config.json is missing" in capsys.readouterr().err
    assert run("merge", "--base", tmp_path, "--adapter", LORA, "--out", tmp_path) != 0
    assert "choose another folder" in capsys.readouterr().err


def test_tokenizer_that_is_not_legacy_has_a_space_only_at_the_beginning(tmp_path):
    folder = shutil.copytree(ORIGINAL / "vicuna-tiny", tmp_path / "vicuna")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}))
    modern, legacy = load_tokenizer(folder), load_tokenizer(ORIGINAL / "vicuna-tiny")
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer("a</s>b").input_ids) for tokenizer in (modern, legacy)]
    assert pieces == [["<s>", "▁a", "</s>", "b"], ["<s>", "▁a", "</s>", "▁b"]]
