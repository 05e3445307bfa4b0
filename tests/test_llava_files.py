"""Broken files of models: every reader names the file, what it is and the remedy, in one sentence; the commands too."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ORIGINAL
from safetensors.torch import load_file, save_file

from llava import checkpoint
from llava.adapters import attach_lora, load_adapter, save_adapter
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.files import whole_folder
from llava.original.adapter import import_adapter_folder
from llava.original.base import config_of, read_base, write_base
from llava.original.names import load_tokenizer, read_weights

VICUNA, CLIP, PROJECTOR = (
    ORIGINAL / name for name in ("vicuna-tiny", "clip-tiny-patch14-42", "mm_projector.bin")
)  # fmt: skip
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 13476839\n"
BREAKS = {
    "pointer": (lambda whole: POINTER.encode(), r"is a Git LFS pointer of \d+ bytes .* 13476839 bytes; run `git lfs"),
    "half": (lambda whole: whole[: len(whole) // 2], r"cut off|damaged"),
    "empty": (lambda whole: b"", "is empty; download it again"),
    "page": (lambda whole: b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_base):
    """A folder of ours, the original's three parts and LoRA, an adapter for the first, all whole."""
    root = tmp_path_factory.mktemp("parts")
    write_base(read_base(VICUNA, CLIP, PROJECTOR), root / "base")
    model, _ = load_base(root / "base")
    save_adapter(attach_lora(model, Llava15, 2, 4, 0.0), root / "adapter")
    for name in ("vicuna-tiny", "clip-tiny-patch14-42", "lora-original"):
        shutil.copytree(ORIGINAL / name, root / name)
    shutil.copy(PROJECTOR, root)
    return root


@pytest.fixture
def broken(parts):
    """A function that breaks a file of the parts; they are whole again behind the test."""
    kept = {}

    def breaks(name, content):
        file = parts / name
        kept.setdefault(file, file.read_bytes() if file.is_file() else None)
        file.write_bytes(content(kept[file])) if content else file.unlink()
        return file

    yield breaks
    for file, content in kept.items():
        file.write_bytes(content)


def one_sentence(error, file, what):
    message = str(error.value)
    assert str(file) in message and "\n" not in message and len(message) < 600, message
    assert re.search(what, message), message


READERS = {
    "base": lambda root: load_base(root / "base"),
    "tokenizer": lambda root: load_tokenizer(root / "vicuna-tiny"),
    "parts": lambda root: read_base(root / "vicuna-tiny", root / "clip-tiny-patch14-42", root / "mm_projector.bin"),
    "adapter": lambda root: load_adapter(attach_lora(*load_base(root / "base"), 2, 4, 0.0), root / "adapter"),
    "lora": lambda root: import_adapter_folder(root / "lora-original", root / "out"),
    "config": lambda root: config_of(root / "base"),
    "processor": lambda root: Llava15.read_processor(root / "base", config_of(root / "base")),
    "weights": lambda root: read_weights(root / "base"),
}
FILES = [
    *(("base", f"base/{name}") for name in ("config.json", "model.safetensors", "tokenizer.json")),
    ("base", "base/generation_config.json"),
    *(("processor", f"base/{name}") for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json")),
    *(("tokenizer", f"vicuna-tiny/{name}") for name in ("tokenizer.model", "tokenizer_config.json")),
    *(("parts", f"vicuna-tiny/{name}") for name in ("config.json", "pytorch_model.bin", "tokenizer.model")),
    *(("parts", f"clip-tiny-patch14-42/{n}") for n in ("config.json", "pytorch_model.bin", "preprocessor_config.json")),
    ("parts", "mm_projector.bin"),
    *(("adapter", f"adapter/{name}") for name in ("adapter_config.json", "adapter_model.safetensors")),
    *(("lora", f"lora-original/{name}") for name in ("adapter_model.bin", "non_lora_trainables.bin", "config.json")),
    ("config", "base/config.json"),
    ("weights", "base/model.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize(("reader", "name"), FILES)
def test_a_broken_file_is_named(parts, broken, reader, name, kind):
    content, what = BREAKS[kind]
    file = broken(name, content)
    with pytest.raises((ValueError, OSError)) as error:
        READERS[reader](parts)
    one_sentence(error, file, what)


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        f
        for f in FILES
        if not f[1].endswith(("generation_config.json", "tokenizer_config.json", "processor_config.json"))
    ],
)
def test_a_missing_file_is_named(parts, broken, reader, name):
    file = broken(name, None)
    with pytest.raises((ValueError, OSError)) as error:
        READERS[reader](parts)
    message = str(error.value)
    assert str(file.parent) in message and "\n" not in message, message


def test_a_cut_or_padded_safetensors_tells_the_sizes(parts, broken):
    whole = (parts / "base/model.safetensors").stat().st_size
    for length in (5, 100, whole - 1):
        broken("base/model.safetensors", lambda content, length=length: content[:length])
        with pytest.raises(ValueError, match=rf"it has {length} bytes, |is no safetensors file"):
            load_base(parts / "base")
    broken("base/model.safetensors", lambda content: content + b"\0\0")
    with pytest.raises(ValueError, match=f"behind its tensors: it has {whole + 2} bytes, not {whole}"):
        load_base(parts / "base")


def test_a_shard_that_is_a_pointer_is_named(parts, tmp_path):
    folder = shutil.copytree(parts / "base", tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    (folder / "model-2-of-2.safetensors").write_text(POINTER)
    names = {name: "model-1-of-2.safetensors" for name in load_file(folder / "model-1-of-2.safetensors")}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names | {"more": "model-2-of-2.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"model-2-of-2\.safetensors is a Git LFS pointer"):
        load_base(folder)


def command(monkeypatch, *arguments):
    """The command in this process: its exit's message, which is one line; None if it did its work."""
    monkeypatch.setattr(sys, "argv", ["llava.checkpoint", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        checkpoint.main()
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code and end.code.startswith("llava.checkpoint: "), (
            end.code
        )
        return end.code
    finally:
        signal.signal(signal.SIGTERM, before)


def commands(root, out):
    return {
        "assemble": ["assemble", "--llm", root / "vicuna-tiny", "--vision", root / "clip-tiny-patch14-42"]
        + ["--projector", root / "mm_projector.bin", "--out", out],
        "assemble-whole": ["assemble", "--llm", root / "base", "--out", out],
        "disassemble": ["disassemble", "--from", root / "base", "--out", out],
        "import": ["import-adapter", "--from", root / "lora-original", "--out", out, "--base", root / "base"],
        "export": ["export-adapter", "--from", root / "adapter", "--out", out, "--base", root / "base"],
        "merge": ["merge", "--base", root / "base", "--adapter", root / "adapter", "--out", out],
    }  # fmt: skip


CLIPS = ("clip-tiny-patch14-42/config.json", "clip-tiny-patch14-42/preprocessor_config.json")
OURS = ("base/config.json", "base/processor_config.json", "base/tokenizer_config.json")
JSONS = {
    "assemble": ("vicuna-tiny/config.json", *CLIPS),
    "assemble-whole": OURS,
    "disassemble": ("base/config.json",),
    "import": ("lora-original/adapter_config.json", "base/config.json"),
    "export": ("adapter/adapter_config.json", "base/config.json"),
    "merge": ("adapter/adapter_config.json", *OURS),
}  # fmt: skip


def mutants(content, top=True):
    """The content with one value gone or of another type, at any depth."""
    for key, value in content.items():
        yield {k: v for k, v in content.items() if k != key}
        for other in (None, "x", [], -1) if not isinstance(value, dict) else (None, "x"):
            yield content | {key: other}
        if isinstance(value, dict):
            yield from (content | {key: inner} for inner in mutants(value, False))
    if top:
        yield {}


@pytest.mark.slow
@pytest.mark.parametrize("name", JSONS)
def test_any_wrong_setting_ends_in_one_line_or_in_a_folder(parts, broken, tmp_path, monkeypatch, capsys, name):
    """Wherever a key of a configuration is missing or of another type: never a traceback, never half a folder.

    Six chosen ones of every file; all were tried once, in eight minutes.
    """
    refused = 0
    for file in JSONS[name]:
        every = list(mutants(json.loads((parts / file).read_text())))
        for number, content in enumerate(random.Random(0).sample(every, 6)):
            broken(file, lambda whole, content=content: json.dumps(content).encode())
            out = tmp_path / f"{file.replace('/', '-')}-{number}"
            if command(monkeypatch, *commands(parts, out)[name]):
                refused += 1
                assert not out.exists()
            else:
                shutil.rmtree(out)
            assert not list(tmp_path.glob(".*"))
        broken(file, lambda whole: whole)
    assert refused


@pytest.mark.parametrize("name", ["assemble", "assemble-whole", "disassemble", "import", "export", "merge"])
def test_an_error_at_the_last_file_leaves_nothing(parts, tmp_path, monkeypatch, name):
    for module in (
        "llava.original.base.save_torch_state_dict",
        "llava.original.adapter.save_file",
        "llava.original.adapter.torch.save",
    ):
        monkeypatch.setattr(module, lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    assert "No space left" in command(monkeypatch, *commands(parts, tmp_path / "a" / "out")[name])
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_with_weights_is_not_written_into(parts, tmp_path, monkeypatch):
    arguments = commands(parts, tmp_path / "out")["merge"]
    assert command(monkeypatch, *arguments) is None
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {wanted}
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "out holds weights already (model.safetensors)" in command(monkeypatch, *arguments)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "file").write_text("")
    assert "is a file" in command(monkeypatch, *commands(parts, tmp_path / "file")["merge"])
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "config.json").write_text("{}")
    (tmp_path / "card" / "README.md").write_text("mine")
    assert command(monkeypatch, *commands(parts, tmp_path / "card")["merge"]) is None
    assert (tmp_path / "card" / "README.md").read_text() == "mine"
    assert load_base(tmp_path / "card")


def test_weights_come_last(tmp_path):
    seen = []
    with whole_folder(tmp_path / "out") as draft:
        for name in ("model.safetensors", "z.json", "sub/a.bin", "a.json"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)
        rename = type(draft).replace
        type(draft).replace, kept = lambda file, place: (seen.append(file.name), rename(file, place))[1], rename
    type(draft).replace = kept
    assert seen == ["a.json", "z.json", "model.safetensors", "a.bin"]
    assert (tmp_path / "out" / "sub" / "a.bin").read_text() == "sub/a.bin"


def test_a_terminated_command_leaves_nothing(parts, tmp_path):
    """Killed while the folder beside is being written: there the command waits for weights that take a minute."""
    slow = "import time, llava.original.base; llava.original.base.read_weights = lambda *_: time.sleep(60)"
    code = f"{slow}; from llava.checkpoint import main; main()"
    line = ["assemble", "--llm", parts / "vicuna-tiny", "--vision", parts / "clip-tiny-patch14-42"]
    line += ["--projector", parts / "mm_projector.bin", "--out", tmp_path / "out"]
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, line)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.terminate()
    assert child.communicate(timeout=60)[1].splitlines()[-1] == "llava.checkpoint: stopped" and child.returncode == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_everywhere(parts, broken, tmp_path, monkeypatch, value):
    """With the names of the tensors and the file, by every command that reads it; nothing is written."""

    def poisoned(name, key):
        state = read_weights(parts / name)
        state[key].view(-1)[3] = value
        file = tmp_path / "poison"
        save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
        return broken(name, lambda _: file.read_bytes())

    for name, key, readers in (
        ("mm_projector.bin", "model.mm_projector.2.bias", ("assemble",)),
        ("vicuna-tiny/pytorch_model.bin", "model.layers.1.mlp.up_proj.weight", ("assemble",)),
        ("clip-tiny-patch14-42/pytorch_model.bin", "vision_model.pre_layrnorm.weight", ("assemble",)),
        ("lora-original/non_lora_trainables.bin", "base_model.model.model.mm_projector.0.weight", ("import",)),
        ("lora-original/adapter_model.bin", None, ("import",)),
        ("adapter/adapter_model.safetensors", None, ("export", "merge")),
        ("base/model.safetensors", "multi_modal_projector.linear_1.weight", ("merge", "disassemble", "assemble-whole")),
    ):
        key = key or sorted(read_weights(parts / name))[0]
        file = poisoned(name, key)
        for reader in readers:
            said = command(monkeypatch, *commands(parts, tmp_path / "out")[reader])
            assert f"{file} holds NaN or infinity in {key}" in (said or ""), (reader, said)
            assert not (tmp_path / "out").exists()
        broken(name, lambda whole: whole)
