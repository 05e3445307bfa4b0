"""The seam between families of base models and everything else: a second family, as docs/extending.md writes it."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.benchmark import open_benchmark
from data.check import check
from data.columns import training_columns
from data.records import Sample
from llava.adapters import attach_lora, trainable_parameters
from llava.backbones import FAMILIES, load_base, open_backbone
from llava.backbones.llava15 import VICUNA, Llava15
from llava.check import reader_of
from llava.dataset import Collator, InstructionDataset
from llava.features import FeatureCache
from llava.generate import generate_answers
from llava.greedy import Decoder

ROOT = Path(__file__).parents[1]
TASKS = {"Colours": ("Which colour has", ["red", "blue", "green"]), "Sizes": ("How large is", ["small", "huge"])}
ROOMS = ("data", "llava", "llaca", "eval", "studies", "configs", "scripts")
FOREIGN = r"LlavaForConditionalGeneration|LlavaProcessor|LlavaConfig|multi_modal_projector|vision_tower|ASSISTANT|</s>"


def llama_file() -> str:
    """The family's file in docs/extending.md."""
    text = (ROOT / "docs" / "extending.md").read_text()
    return re.search(r"`llava/backbones/llama\.py`.*?```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama of two layers and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("llama")
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer, draft.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=words, initial_alphabet=alphabet, show_progress=False)
    draft.train_from_iterator([f"{ask} {word}?" for ask, said in TASKS.values() for word in said], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=draft, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The family of the documents, known in this process."""
    path = tmp_path / "llama.py"
    path.write_text(llama_file())
    spec = importlib.util.spec_from_file_location("llama", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "llama", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, "llama", module.Llama)
    return module.Llama


def write_benchmark(root: Path, picture: bool = False) -> Path:
    """Two tasks of texts; with `picture`, one record shows one."""
    root.mkdir()
    names = "".join(f"  {task}: {{scoring: open, max_new_tokens: 4}}\n" for task in TASKS)
    (root / "benchmark.yaml").write_text(f"name: Words\ninstructions: {{original: .}}\ntasks:\n{names}")
    for number, (task, (ask, said)) in enumerate(TASKS.items()):
        folder, train, test = root / task, [], []
        folder.mkdir()
        for index in range(24):
            question, answer = f"{ask} thing {index % len(said)}?\nSay a {task.lower()} word.", said[index % len(said)]
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            train.append({"id": f"{task} {index}", "conversations": turns})
            test.append({"question_id": f"{number}-{index}", "text": question, "answer": answer})
        if picture:
            train[3]["image"] = "a.png"
        (folder / "train.json").write_text(json.dumps(train))
        (folder / "test.json").write_text(json.dumps(test))
    return root


def test_a_family_of_the_documents_trains_and_answers_by_the_same_commands(llama, tmp_path):
    """One file and one line in a copy of the code: two stages with LLaCA, answered and put into the tables."""
    tree, data = tmp_path / "tree", write_benchmark(tmp_path / "words")
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__", "coin_mini", ".cache")
        shutil.copytree(ROOT / room, tree / room, ignore=ignored)
    (tree / "llava" / "backbones" / "llama.py").write_text(llama_file())
    place = tree / "llava" / "backbones" / "__init__.py"
    text = place.read_text()
    line = re.search(r'`("llama": Llama,)` in `FAMILIES`', (ROOT / "docs" / "extending.md").read_text())[1]
    imports = "from llava.backbones.llama import Llama\nfrom llava.backbones.llava15"
    text = text.replace("from llava.backbones.llava15", imports, 1)
    place.write_text(text.replace('    "llava": Llava15,\n', f'    "llava": Llava15,\n    {line}\n'))
    recipe = tmp_path / "words.yaml"
    recipe.write_text(f"base: {llama}\ndata_root: {data}\nlora_rank: 16\nlora_alpha: 32\ndtype: float32\nepochs: 20\n"
                      "batch_size: 4\nlearning_rate: 1.0e-2\ngradient_checkpointing: false\n")  # fmt: skip
    around = {**os.environ, "PYTHONPATH": str(tree), "LLACA_CACHE": str(tmp_path / "cache")}

    def told(module: str, *options: str) -> str:
        runs = ["--runs-dir", str(tmp_path / "runs")]
        done = subprocess.run(
            [sys.executable, "-m", module, *options, *runs], cwd=tree, env=around, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    told("llaca.launch", "--recipe", str(recipe), "--method", "llaca", "--average", "eq45", "--grouping", "false",
         "--run", "words")  # fmt: skip
    stages = sorted((tmp_path / "runs" / "words" / "stages").iterdir())
    assert [stage.name for stage in stages] == ["01-Colours", "02-Sizes"]
    story = json.loads((stages[1] / "stage.json").read_text())
    assert story["averaged"] and story["steps"] == 120
    table = told("eval.report", "--run", "words")
    assert "Colours" in table and "Sizes" in table
    rows = list(csv.reader((tmp_path / "runs" / "words" / "matrix.csv").open()))
    assert float(rows[1][1]) == 100, ("twenty epochs over three questions are learnt", rows)


def test_its_logits_loss_and_answers_are_stock_transformers(llama, family, tmp_path):
    model, backbone = load_base(llama)
    assert isinstance(backbone, family) and backbone.silent == []
    torch.manual_seed(0)
    model = attach_lora(model, backbone, 4, 8, 0.0).eval()
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.normal_(0, 0.1)
    assert all("lora_" in name for name in trainable_parameters(model))
    samples = [Sample(n, f"s{n}", ((f"How large is {n}?", "small " * n + "huge"),), None, 4) for n in range(4)]
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    expected = 0.0
    for sample in samples:
        [(question, answer)] = sample.turns
        ask = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
               f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
        prompt, ids = tokenizer(ask).input_ids, tokenizer(f"{ask}{answer}<|im_end|>").input_ids
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected += loss.item() * (len(ids) - len(prompt))
        inputs = torch.tensor([prompt])
        output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False,
                                max_new_tokens=6)  # fmt: skip
        wanted = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        assert generate_answers(Decoder(model, backbone, 6), [question], [None]) == [wanted]
    with torch.no_grad():
        found = backbone.answer_loss(model, Collator(backbone)(list(dataset)))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    asked = [sample.turns[0][0] for sample in samples]
    single = [generate_answers(Decoder(model, backbone, 6), [text], [None])[0] for text in asked]
    assert generate_answers(Decoder(model, backbone, 6), asked, [None] * 4, 4) == single


def test_what_a_family_cannot_do_is_refused_by_name(llama, family, tmp_path):
    reader = reader_of(llama, dict.fromkeys(TASKS, 512), False)
    benchmark = open_benchmark(write_benchmark(tmp_path / "shown", picture=True))
    (benchmark.root / "a.png").write_bytes((ROOT / "docs" / "coin_mini.png").read_bytes())
    report = check(benchmark, "original", reader=reader)
    assert not report.ok and report.text().count("it shows a picture, and this base model takes none") == 2
    model, backbone = load_base(llama)
    for reuse in (backbone.vision, lambda m: backbone.use_features(m, FeatureCache([], torch.empty(0)))):
        with pytest.raises(ValueError, match=r"reuse_vision_features: .* cannot; leave it out"):
            reuse(model)
    with pytest.raises(ValueError, match="cannot; leave it out"):
        backbone.vision_features(model, [[]])
    with pytest.raises(ValueError, match=r"question 0 \('<image>\\nq'\): it shows a picture"):
        generate_answers(Decoder(model, backbone, 6), ["<image>\nq"], [None])
    with pytest.raises(ValueError, match="takes no pictures"):
        backbone.picture(Path("a.png"))
    with pytest.raises(ValueError, match="do not go together"):
        generate_answers(Decoder(model, backbone, 6), ["Which?"], [Path("a.png")])
    columns = training_columns([Sample(0, "s", (("<image>\nq", "a"),), "a.png", 2)], "last line", backbone.vocabulary)
    assert len(columns) == 0 and [problem.kind for problem in columns.problems] == ["tokens"]


def test_a_folder_of_no_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'bert'; take a base of .* llava, "):
        open_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["llava"]}))
    with pytest.raises(ValueError, match=r"model_type is \['llava'\]"):
        open_backbone(tmp_path)


class Other(Llava15):
    """LLaVA-1.5 with another word for a picture."""

    template = replace(VICUNA, placeholder="<pad>")


def test_words_of_a_template_in_a_record_are_refused_by_name(llama, family):
    """The end of a turn inside an answer, and the family's own word for a picture: both are tokens."""
    vocabulary = load_base(llama)[1].vocabulary
    [found] = vocabulary.conversations([[("What?", "dog<|im_end|>cat")]])
    assert isinstance(found, ValueError) and "cannot express" in str(found)
    template = Other.template
    for turns in ([("What is <pad>?", "dog")], [("What?", "a <pad>")]):
        with pytest.raises(ValueError, match="holds <pad>, this base model's word for a picture; take it out"):
            template.layout(turns)
    assert template.prompt("<image>\nWhat?").endswith("USER: <pad>\nWhat? ASSISTANT:")


def test_no_family_is_named_outside_its_file():
    """llava/original/ turns files of the original LLaVA into such a family's folder, and back. Records of a benchmark
    say `<image>`, whatever the family's own word is."""
    for room in ("data", "llava", "llaca", "eval", "studies"):
        for path in (ROOT / room).rglob("*.py"):
            if not {"backbones", "original"} & set(path.relative_to(ROOT).parts):
                words = FOREIGN if room == "data" else f"{FOREIGN}|<image>|image_token"
                assert not re.findall(words, path.read_text()), path
