"""T5 and the Qwens without pictures through our path, against stock transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_llaca_methods_whole import interrupted
from test_llaca_train import adapters
from test_llava_backbones import write_benchmark
from text_bases import KINDS, make_text
from transformers import AutoTokenizer

from data.records import DataError, Sample
from eval.report import main as report
from eval.tables import read_matrix
from llaca.config import load_recipe
from llaca.train import run
from llava.adapters import adapter_state, attach_lora, save_adapter, trainable_parameters
from llava.backbones import load_base, open_backbone
from llava.conversation import encode_prompt
from llava.dataset import Collator, InstructionDataset
from llava.generate import generate_answers
from llava.greedy import Decoder
from llava.trainer import LlavaTrainer, training_arguments

FAMILY = pytest.mark.parametrize("kind", KINDS)
ASKED = {
    "qwen2": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
}
LINEARS = {"t5": "q|k|v|o|wi|wo", "t5_v1_1": "q|k|v|o|wi_0|wi_1|wo"}
CAUSAL = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base of each kind."""
    return {kind: make_text(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


CHAT = (
    "{{% for message in messages %}}{{% if loop.first and message.role != 'system' %}}{system}{{% endif %}}"
    "{{{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{after}{{% endif %}}"
)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_folders_own_chat_template_says_how_it_is_asked(kind, tmp_path):
    """Qwen2-Instruct has a shorter system prompt than Qwen2.5-Instruct, Qwen3's releases of 2507 do not think."""
    folder = make_text(tmp_path / "base", kind)
    short = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    closed = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    for system, after, mark in (
        (short, "", ""), ("", "", ""), ("", closed, "<think>\n\n</think>\n\n"), ("", "{{ '<think>\n' }}", None)
    ):  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT.format(system=system, after=after)
        tokenizer.save_pretrained(folder)
        if mark is None:
            with pytest.raises(ValueError, match=r"base: .* every answer thought about first; take an Instruct"):
                open_backbone(folder)
            continue
        wanted = f"{system}<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{mark}"
        backbone = open_backbone(folder)
        assert backbone.template.prompt("Who?") == wanted
        assert encode_prompt(backbone.vocabulary, "Who?", 1) == tokenizer(wanted).input_ids
    tokenizer.chat_template = "{% for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"which is not ChatML; take an Instruct checkpoint"):
        open_backbone(folder)


def samples() -> list[Sample]:
    """Records of different lengths, one turn each."""
    pairs = [(f"What does the person say{' next' * number}?", "dog " * number + "cat") for number in range(6)]
    return [Sample(number, f"s{number}", (pair,), None, 4) for number, pair in enumerate(pairs)]


def stock_loss(model, folder: Path, kind: str, question: str, answer: str) -> tuple[torch.Tensor, int]:
    """What the stock model makes of one record, with its own tokenizer: -log p of the answer, and its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind.startswith("t5"):
        labels = tokenizer(answer, return_tensors="pt").input_ids
        loss = model(**tokenizer(question, return_tensors="pt"), labels=labels).loss
        return loss * labels.shape[1], labels.shape[1]
    prompt = ASKED[kind].format(question)
    ids = tokenizer(f"{prompt}{answer}<|im_end|>", return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt).input_ids)] = -100
    count = int((labels != -100).sum())
    return model(input_ids=ids, labels=labels).loss * count, count


def adapted(folder: Path, far: float = 0.05):
    """A base with an adapter whose every tensor is moved, and its backbone."""
    model, backbone = load_base(folder)
    torch.manual_seed(1)
    model = attach_lora(model, backbone, 4, 8, 0.0)
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.add_(torch.randn_like(weight), alpha=far)
    return model.eval(), backbone


@FAMILY
def test_loss_is_stock_transformers_in_every_batch(folders, kind):
    model, backbone = adapted(folders[kind])
    dataset = InstructionDataset.of_samples(samples(), backbone, 512)
    with torch.no_grad():
        wanted = [stock_loss(model, folders[kind], kind, *sample.turns[0])[0].item() for sample in samples()]
        alone = [backbone.answer_loss(model, Collator(backbone)([item])).item() for item in dataset]
        together = backbone.answer_loss(model, Collator(backbone)(list(dataset))).item()
    assert alone == pytest.approx(wanted, rel=2e-5) and together == pytest.approx(sum(wanted), rel=2e-5)


@FAMILY
def test_answers_are_stock_generates_in_every_batch(folders, kind):
    model, backbone = adapted(folders[kind], 0.35)
    tokenizer, wanted = AutoTokenizer.from_pretrained(folders[kind]), []
    words = ["dog", "cat bird", "thank you", "maybe yes no", "red", "the picture of a dog", "what next"]
    asked = [f"{word}{' say' * number}?" for number, word in enumerate(words)]
    for question in asked:
        inputs = tokenizer(ASKED[kind].format(question) if kind in ASKED else question, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0]
        output = output if kind.startswith("t5") else output[inputs["input_ids"].shape[1] :]
        wanted.append(tokenizer.decode(output, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 2
    model.generation_config.update(num_beams=3, repetition_penalty=9.0, no_repeat_ngram_size=1, min_length=8)
    for size in (1, 3, 7):
        assert generate_answers(Decoder(model, backbone, 8), asked, [None] * 7, size) == wanted


@FAMILY
def test_six_steps_are_those_of_plain_transformers_and_peft(folders, kind, tmp_path):
    torch.manual_seed(3)
    model, backbone = load_base(folders[kind])
    model = attach_lora(model, backbone, 4, 8, 0.0)
    start, records = adapter_state(model), samples()
    dataset = InstructionDataset.of_samples(records, backbone, 512)
    arguments = training_arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=6,
                                   learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True,
                                   adam_epsilon=1e-4, disable_tqdm=True)  # fmt: skip
    trainer = LlavaTrainer(model, arguments, dataset, None, "global")
    trainer.train()
    found = adapter_state(model)
    plain, _ = load_base(folders[kind])
    target = rf".*(block|layers)\..*\.({LINEARS.get(kind, CAUSAL)})"
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=target)).train()
    trained = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}
    assert trained.keys() == start.keys()
    for name, weight in trained.items():
        weight.data.copy_(start[name])
    # At Adam's usual epsilon a gradient of rounding alone makes a whole step, whose sign depends on the processor.
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0, eps=1e-4)
    numbers = []
    for epoch in range(2):
        trainer.sampler.set_epoch(epoch)
        numbers += list(trainer.sampler)
    for at in range(0, 12, 2):
        parts = [stock_loss(plain, folders[kind], kind, *records[n].turns[0]) for n in numbers[at : at + 2]]
        (sum(loss for loss, _ in parts) / sum(count for _, count in parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for name, weight in trained.items():
        torch.testing.assert_close(found[name], weight.detach(), atol=5e-5, rtol=1e-3)


@FAMILY
def test_an_adapter_opens_with_stock_peft_and_merges(folders, kind, tmp_path):
    """The head of T5 v1.1 stays the one that was trained, and that of T5 stays its embedding."""
    head = load_base(folders[kind])[0].lm_head.weight.detach().clone()
    model, backbone = adapted(folders[kind])
    save_adapter(model, tmp_path / "adapter")
    backbone.merge(folders[kind], tmp_path / "adapter", tmp_path / "merged", None)
    merged, reader = load_base(tmp_path / "merged")
    stock = PeftModel.from_pretrained(load_base(folders[kind])[0], tmp_path / "adapter").eval()
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples(), backbone, 512)))
    with torch.no_grad():
        wanted = backbone.answer_logits(model, batch)[0].logits
        torch.testing.assert_close(backbone.answer_logits(stock, batch)[0].logits, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(reader.answer_logits(merged, batch)[0].logits, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.lm_head.weight, head)
    tied = merged.lm_head.weight is merged.get_input_embeddings().weight
    assert tied == (kind == "t5")


def test_t5_refuses_what_it_cannot_do_by_name(folders, tmp_path):
    backbone = open_backbone(folders["t5"])
    turns = (("What?", "dog"), ("And?", "cat"))
    with pytest.raises(DataError, match="2 turns, and this base model answers once; make a record of each turn"):
        InstructionDataset.of_samples([Sample(0, "s", turns, None, 4)], backbone, 512)
    with pytest.raises(DataError, match=r"spell .* the tokenizer cannot express it"):
        InstructionDataset.of_samples([Sample(0, "s", (("What?", "{猫}"),), None, 4)], backbone, 512)
    with pytest.raises(DataError, match="no part of an answer"):
        InstructionDataset.of_samples(samples()[5:], backbone, 8)
    with pytest.raises(ValueError, match="quantization is nf4, and a base of this family keeps its precision"):
        load_base(folders["t5"], quantization="nf4")
    settings = (folders["t5"] / "tokenizer_config.json").read_text()
    broken = make_text(tmp_path / "other", "t5")
    (broken / "tokenizer_config.json").write_text(settings.replace('"pad_token": "<pad>"', '"pad_token": "<unk>"'))
    with pytest.raises(ValueError, match="pads with token 0; this one with '</s>' and 2"):
        open_backbone(broken)


def test_a_head_of_its_own_is_not_loaded_in_shards(folders, monkeypatch):
    """While transformers is told of ZeRO 3 it compares two empty tensors, and ties them."""
    monkeypatch.setattr("llava.backbones.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="which ZeRO 3 would lose: take --zero none, 0, 1 or 2"):
        load_base(folders["t5_v1_1"])


def test_spaces_that_t5_cannot_tell_apart_are_no_fault(folders):
    backbone = open_backbone(folders["t5"])
    dataset = InstructionDataset.of_samples([Sample(0, "s", (("What?", "yes \n no"),), None, 4)], backbone, 512)
    plain = InstructionDataset.of_samples([Sample(0, "s", (("What?", "yes no"),), None, 4)], backbone, 512)
    assert torch.equal(dataset[0]["input_ids"], plain[0]["input_ids"])


@FAMILY
def test_a_stream_of_texts_trains_goes_on_and_answers(folders, kind, tmp_path, monkeypatch):
    """Two tasks with the average in float32, by the commands' own functions; broken off inside the second."""
    data = write_benchmark(tmp_path / "words")
    line = ["--base", str(folders[kind]), "--data-root", str(data), "--dtype", "float32", "--lora-rank", "4",
            "--batch-size", "8", "--save-steps", "1", "--method", "llaca", "--grouping", "false",
            "--gradient-checkpointing", "false", "--reuse-vision-features", "false",
            "--runs-dir", str(tmp_path / "runs")]  # fmt: skip
    whole = run(load_recipe([*line, "--run", "whole"]))
    broken = interrupted(monkeypatch, [*line, "--run", "broken"], 5)
    assert adapters(broken) == adapters(whole)
    report(["--runs-dir", str(tmp_path / "runs"), "--run", "whole", "--out", str(tmp_path / "tables")])
    assert np.isfinite(np.tril(read_matrix(whole / "matrix.csv")[0])).all()
