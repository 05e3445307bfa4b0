"""Qwen2.5-VL, Qwen3-VL and InternVL through our path, against stock transformers with its own processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional
from vl_bases import KINDS, PADDING, QWEN, make_vl, stock_processor

from data.records import Sample
from llava.adapters import adapter_state, attach_lora, trainable_parameters
from llava.backbone import BaseOptions
from llava.backbones import load_base
from llava.conversation import encode_prompt
from llava.dataset import Collator, InstructionDataset
from llava.generate import generate_answers
from llava.greedy import Decoder
from llava.prefix import Prefix
from llava.trainer import LlavaTrainer, training_arguments

SYSTEM = {"qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "qwen3_vl": "", "internvl": ""}
SIZES = [(40, 24), (24, 40), (16, 16), (200, 30), (5, 9)]  # the first two: as many tokens, other positions
FAMILY = pytest.mark.parametrize("kind", KINDS)
QWENS = pytest.mark.parametrize("kind", QWEN)
PICTURE = dict.fromkeys(QWEN, "<|vision_start|><|image_pad|><|vision_end|>") | {"internvl": "<IMG_CONTEXT>\n"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base of each family."""
    return {kind: make_vl(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Noise of several shapes."""
    folder, rng, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number, (width, height) in enumerate(SIZES):
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return paths


def prompt_of(kind: str, question: str, shown: bool) -> str:
    """What the families' own chat templates make of a first question."""
    picture = PICTURE[kind] if shown else ""
    return f"{SYSTEM[kind]}<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"


def stock_inputs(folder: Path, kind: str, text: str, path: Path | None):
    """What the stock processor makes of one text and its picture."""
    images = None if path is None else [Image.open(path).convert("RGB")]
    return stock_processor(folder, kind)(text=[text], images=images, return_tensors="pt")


def samples_of(pictures: list[Path]) -> list[Sample]:
    """One record a picture, one of them of two turns, and two without."""
    found = []
    for number, path in enumerate([*pictures, None, None]):
        shown = "<image>\n" if path else ""
        turns = [(f"{shown}What is it{' really' * number}?", "dog " * number + "cat")]
        if number in (1, 6):
            turns.append(("Which colour?", "red"))
        found.append(Sample(number, f"s{number}", tuple(turns), path and str(path), 4))
    return found


@FAMILY
def test_tokens_logits_and_loss_are_stock_transformers(folders, pictures, kind):
    """Of each record alone, with the stock processor's own ids, patches and types; then of all in one batch."""
    model, backbone = load_base(folders[kind])
    samples, total, words = samples_of(pictures), 0.0, 0
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    batch = Collator(backbone)(list(dataset))
    with torch.no_grad():
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    for row, sample in enumerate(samples):
        (question, answer), *more = sample.turns
        text = prompt_of(kind, question.removeprefix("<image>\n"), sample.image is not None) + f"{answer}<|im_end|>"
        for ask, said in more:
            text += f"\n<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>"
        stock = stock_inputs(folders[kind], kind, text, sample.image)
        ids, item = stock["input_ids"][0], dataset[row]
        assert item["input_ids"].tolist() == ids.tolist()
        for key in ("pixel_values", "image_grid_thw"):
            assert key not in item or torch.equal(item[key].reshape(stock[key].shape), stock[key])
        labels = torch.full_like(ids, -100)
        starts = [at + 3 for at in range(len(ids)) if ids[at : at + 3].tolist() == assistant_ids(backbone)]
        for start, (_, said) in zip(starts, sample.turns, strict=True):
            end = start + len(backbone.tokenizer(f"{said}<|im_end|>").input_ids)
            labels[start:end] = ids[start:end]
        assert torch.equal(item["labels"], labels)
        with torch.no_grad():
            alone = model(**stock, labels=labels[None])
        count = int((labels != -100).sum())
        total, words = total + alone.loss.item() * count, words + count
        torch.testing.assert_close(together[row, : len(ids)], alone.logits[0], atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        ours = backbone.answer_loss(model, batch).item()
    assert ours == pytest.approx(total, rel=1e-5) and words > 20


def assistant_ids(backbone) -> list[int]:
    """The tokens before an answer: <|im_start|>, "assistant", a line break."""
    ids = backbone.tokenizer("<|im_start|>assistant\n").input_ids
    return ids[-3:]


@FAMILY
def test_greedy_answers_are_stock_generates(folders, pictures, kind):
    """In every batch size; questions about one picture share its prefix, and pictures of equal tokens one cache."""
    model, backbone = load_base(folders[kind])
    asked = [(f"Which{' one' * number}?", path) for path in [*pictures, None] for number in range(3)]
    wanted = []
    for question, path in asked:
        stock = stock_inputs(folders[kind], kind, prompt_of(kind, question, path is not None), path)
        output = model.generate(**stock, do_sample=False, max_new_tokens=6)[0, stock["input_ids"].shape[1] :]
        wanted.append(backbone.tokenizer.decode(output, skip_special_tokens=True).strip())
    prompts = [f"<image>\n{question}" if path else question for question, path in asked]
    images = [path for _, path in asked]
    assert len(set(wanted)) > 10
    for size in (1, 4, 18):
        assert generate_answers(Decoder(model, backbone, 6), prompts, images, size) == wanted, size


@FAMILY
def test_two_pictures_prefixes_are_held_at_once(folders, pictures, kind):
    """The model keeps one offset of positions, that of the picture it saw last; each prefix here has its own."""
    model, backbone = load_base(folders[kind])
    decoder, question = Decoder(model, backbone, 6), "<image>\nWhat is the animal?"
    prefixes, rests = [], []
    for path in (pictures[0], pictures[3]):
        [count] = backbone.picture_tokens(Path(), [str(path)])
        ids = encode_prompt(backbone.vocabulary, question, int(count))
        prefixes.append(decoder.prefix(ids[:-4], [backbone.picture(path)]))
        rests.append(ids[-4:])
    found = [decoder.answer(prefix, [rest])[0] for prefix, rest in zip(prefixes, rests, strict=True)]
    for tokens, path in zip(found, (pictures[0], pictures[3]), strict=True):
        text = prompt_of(kind, "What is the animal?", True)
        stock = stock_inputs(folders[kind], kind, text, path)
        output = model.generate(**stock, do_sample=False, max_new_tokens=6)[0, stock["input_ids"].shape[1] :].tolist()
        assert tokens == [token for token in output if token != backbone.tokenizer.eos_token_id]
    assert (prefixes[0].next.tolist() != [prefixes[0].length]) == (kind in QWEN)


@QWENS
def test_positions_that_pictures_save_are_those_of_the_model(folders, pictures, kind):
    model, backbone = load_base(folders[kind])
    stacked = backbone.stack([backbone.picture(path) for path in pictures])
    for row, path in enumerate(pictures):
        [count] = backbone.picture_tokens(Path(), [str(path)])
        ids = torch.tensor([encode_prompt(backbone.vocabulary, "<image>\nWhat?", int(count))])
        grid = stacked["image_grid_thw"][row : row + 1]
        _, delta = model.model.get_rope_index(ids, backbone.beside_ids(ids)["mm_token_type_ids"], image_grid_thw=grid)
        assert int(backbone.positions_saved(stacked)[row]) == -int(delta)


@QWENS
def test_pictures_without_their_token_types_are_refused(folders, pictures, kind):
    """Without them Qwen2.5-VL answers, as if a picture were a line of text; zeros are taken, too."""
    model, backbone = load_base(folders[kind])
    batch = Collator(backbone)([InstructionDataset.of_samples(samples_of(pictures)[:1], backbone, 512)[0]])
    assert batch["mm_token_type_ids"].sum() == 15
    with pytest.raises(ValueError, match="no token that stands for one"):
        backbone.beside_ids(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="no token that stands for one"):
        Prefix.of(model, backbone, [1, 2, 3], backbone.stack([backbone.picture(pictures[0])]), 1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    if kind == "qwen2_5_vl":
        with torch.no_grad():
            right, wrong = (
                model(**inputs, **more).logits for more in ({"mm_token_type_ids": batch["mm_token_type_ids"]}, {})
            )
        assert (right - wrong).abs().max() > 0.1


@FAMILY
def test_every_token_that_ends_a_text_ends_an_answer(folders, kind):
    """generation_config.json of the published checkpoints names two."""
    model, backbone = load_base(folders[kind])
    with torch.no_grad():
        ids = torch.tensor([encode_prompt(backbone.vocabulary, "Is it?", 1)])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[backbone.tokenizer.pad_token_id] = hidden
    decoder = Decoder(model, backbone, 3)
    model.generation_config.eos_token_id = [backbone.tokenizer.eos_token_id, backbone.tokenizer.pad_token_id]
    start = decoder.prefix(ids[0, :-2].tolist(), None)
    assert decoder.answer(start, [ids[0, -2:].tolist()]) == [[]]


@FAMILY
def test_rows_beyond_the_vocabulary_can_be_answered(folders, kind):
    """An untrained row has no text; nothing breaks, and the tokens beside it are read."""
    model, backbone = load_base(folders[kind])
    assert model.lm_head.weight.shape[0] == len(backbone.tokenizer) + PADDING and backbone.silent == []
    with torch.no_grad():
        ids = torch.tensor([encode_prompt(backbone.vocabulary, "Is it?", 1)])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[-1] = hidden
    assert generate_answers(Decoder(model, backbone, 1), ["Is it?"], [None]) == [""]


@FAMILY
def test_six_steps_are_those_of_plain_transformers_and_peft(folders, pictures, kind, tmp_path):
    """LoRA and mergers, pictures and text: stock classes, torch's AdamW, the mean over a batch's supervised tokens."""
    samples = samples_of(pictures)[:6]
    torch.manual_seed(3)
    model, backbone = load_base(folders[kind])
    model = attach_lora(model, backbone, 4, 8, 0.0)
    start = adapter_state(model)
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    arguments = training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2,
                                   lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = LlavaTrainer(model, arguments, dataset)
    trainer.train()
    found = adapter_state(model)

    plain, _ = load_base(folders[kind])
    levels = range(len(getattr(plain.config.vision_config, "deepstack_visual_indexes", ())))
    whole = ["visual.merger", *(f"deepstack_merger_list.{level}" for level in levels)]
    whole = whole if kind in QWEN else ["multi_modal_projector"]
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=rf".*language_model.*\.({names})", modules_to_save=whole)
    plain = get_peft_model(plain, config)
    trained = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}
    assert trained.keys() == start.keys()
    for name, weight in trained.items():
        weight.data.copy_(start[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    batches = drawn(trainer)
    assert len(batches) == 6
    for numbers in batches:
        loss, count = 0.0, 0
        for number in numbers:
            sample = samples[number]
            text = prompt_of(kind, sample.turns[0][0].removeprefix("<image>\n"), sample.image is not None)
            for place, (ask, said) in enumerate(sample.turns):
                if place:
                    text += f"\n<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
                text += f"{said}<|im_end|>"
            stock = stock_inputs(folders[kind], kind, text, sample.image)
            labels = dataset[number]["labels"]
            logits = plain(**stock).logits[0]
            loss = loss + functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for name, weight in trained.items():
        torch.testing.assert_close(found[name], weight.detach(), atol=2e-5, rtol=2e-4)
        assert not torch.equal(weight, start[name]), name


@FAMILY
def test_checkpointing_changes_nothing_and_leaves_the_tower_alone(folders, pictures, kind, tmp_path):
    """Nothing of the frozen tower is kept for, or run in, the backward pass."""
    states, towers = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model, backbone = load_base(folders[kind])
        tower = getattr(model.model, "visual", None) or model.model.vision_tower
        block = (tower.blocks if kind in QWEN else tower.encoder.layer)[-1]
        model = attach_lora(model, backbone, 4, 8, 0.0)
        block.register_forward_hook(lambda _, __, output: towers.append(output))
        dataset = InstructionDataset.of_samples(samples_of(pictures), backbone, 512)
        arguments = training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2,
                                       use_cpu=True, disable_tqdm=True,
                                       activation_checkpointing=checkpointing)  # fmt: skip
        LlavaTrainer(model, arguments, dataset).train()
        states.append(adapter_state(model))
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=1e-6)
    shown = [output[0] if isinstance(output, tuple) else output for output in towers]
    assert len(shown) >= 4 and not any(output.requires_grad for output in shown)


def drawn(trainer: LlavaTrainer) -> list[list[int]]:
    """The records of each step of two epochs, as the sampler draws them."""
    found = []
    for epoch in range(2):
        trainer.sampler.set_epoch(epoch)
        numbers = list(trainer.sampler)
        found += [numbers[at : at + 2] for at in range(0, len(numbers), 2)]
    return found


@FAMILY
def test_a_connector_that_does_not_train_stays_and_is_not_asked_for(folders, pictures, kind):
    model, backbone = load_base(folders[kind], options=BaseOptions(train_connector=False))
    model = attach_lora(model, backbone, 4, 8, 0.0)
    assert all("lora_" in name for name in trainable_parameters(model))
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures)[5:], backbone, 512)))
    with backbone.without_picture(model), torch.no_grad():
        assert backbone.answer_loss(model, batch) > 0


@FAMILY
def test_a_batch_without_pictures_reaches_every_trained_tensor_and_changes_nothing(folders, pictures, kind):
    model, backbone = load_base(folders[kind])
    model = attach_lora(model, backbone, 4, 8, 0.0)
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures)[5:], backbone, 512)))
    plain = backbone.answer_loss(model, batch)
    with backbone.without_picture(model):
        loss = backbone.answer_loss(model, batch)
        loss.backward()
    assert loss.item() == plain.item()
    for name, weight in trainable_parameters(model).items():
        assert weight.grad is not None, name
        assert "lora_" in name or not weight.grad.any()


@FAMILY
def test_nf4_trains_the_adapter_of_the_language_models_blocks(kind, pictures, tmp_path):
    folder = make_vl(tmp_path / "base", kind, width=64)
    model, backbone = load_base(folder, quantization="nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    assert {kinds[name] for name in kinds if "language_model" in name} == {"Linear4bit"}
    others = {name for name in kinds if "language_model" not in name}
    assert len(others) > 5 and {kinds[name] for name in others} == {"Linear"}
    model = attach_lora(model, backbone, 4, 8, 0.0)
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures), backbone, 512)))
    backbone.answer_loss(model, batch).backward()
    assert all(weight.grad is not None for weight in trainable_parameters(model).values())
