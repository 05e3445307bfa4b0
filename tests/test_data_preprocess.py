"""What is kept between starts is what would be made anew, is made once, and is never believed when it is stale."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data import cache
from data import preprocess as prepare_module
from data.cache import make_once, replace_whole
from data.columns import Texts
from data.preprocess import RecordFile, columns_file, make_columns, open_records
from data.records import DataError, load_samples
from llava.conversation import encode, encode_prompt, repeated
from llava.dataset import InstructionDataset

LINES = ["Answer with a word.", "Name it", "Give the box: ear"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LLACA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    """A training and a test file with pictures, several turns, other scripts, and one broken record each."""
    rng, root = random.Random(0), tmp_path / "data"
    root.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number}.png")
    records, questions = [], []
    for number in range(90):
        shown, text = number % 3, f"Is it {rng.choice(['red', 'größer', '猫', '1.5'])} {rng.randint(0, 9)}?"
        first = f"{text}\n{rng.choice(LINES)}"
        values = [f"<image>\n{first}" if shown else first, rng.choice(["yes", "no dog", "[0.1, 0.2]"])]
        values += [rng.choice(["And this?", "Why?"]), "B."] * rng.randint(0, 2)
        speech = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
        picture = {"image": f"{number % 4}.png"} if shown else {}
        records.append({"id": f"r{number}", "conversations": speech, **picture})
        questions.append({"question_id": number if number % 2 else f"q{number}", "text": first, **picture})
    records[5]["conversations"].pop()
    questions[7]["text"] = " "
    for name, content in (("train", records), ("test", questions)):
        (root / f"{name}.json").write_text(json.dumps(content))
    return (
        root,
        RecordFile(root / "train.json", "train", "last line"),
        RecordFile(root / "test.json", "test", "last line"),
    )


def test_columns_hold_what_encoding_each_record_gives(own, files, tiny):
    root, train, test = files
    vocabulary = tiny[1].vocabulary
    found = make_columns([train, test], vocabulary)
    columns = found[train]
    assert columns.told["records"] == 90 and [p.record for p in columns.problems] == [5]
    content = json.loads(train.path.read_text())
    content.pop(5)
    (root / "whole.json").write_text(json.dumps(content))
    samples = load_samples(root / "whole.json", root)
    assert len(samples) == len(columns) == 89
    rows = np.arange(len(columns))
    dataset = InstructionDataset(columns, tiny[1], 512, root, rows)
    for index, sample in enumerate(samples):
        expected, item = encode(vocabulary, sample.turns, 36, 512), dataset[index]
        assert item["input_ids"].tolist() == expected.input_ids and item["labels"].tolist() == expected.labels
        assert dataset.picture(index) == sample.image and dataset.length(index) == len(expected.input_ids)
    assert dataset.modality_lengths == [s.words if s.image else -s.words for s in samples]
    assert columns.wordings(rows) == sorted({"Answer with a word", "Name it", "Give the box: ear"})
    questions = found[test]
    asked = [q for q in json.loads(test.path.read_text()) if q["text"].strip()]
    assert [questions.question_id(row) for row in range(len(questions))] == [q["question_id"] for q in asked]
    for row, question in enumerate(asked):
        begin, end = questions.span(row)
        text = f"<image>\n{question['text']}" if "image" in question else question["text"]
        ids = repeated(questions.ids[begin:end].tolist(), vocabulary.image, 36)
        assert ids == encode_prompt(vocabulary, text, 36) and questions.asked[row] == question["text"]


def test_processes_of_their_own_make_the_same_bytes(own, files, tiny, monkeypatch):
    root, *sources = files
    vocabulary = tiny[1].vocabulary
    make_columns(sources, vocabulary)
    here = {source: columns_file(source, vocabulary).read_bytes() for source in sources}
    monkeypatch.setattr(prepare_module, "ALONE", 0)
    monkeypatch.setattr(prepare_module, "LOOKED_AT", 0)
    monkeypatch.setenv("LLACA_CACHE", str(own / "other"))
    broken = RecordFile(root / "broken.json", "train", "last line")
    broken.path.write_text("[{]")
    (root / "3.png").write_bytes(b"no picture")
    found = open_records([*sources, broken], root, vocabulary)
    assert {source: columns_file(source, vocabulary).read_bytes() for source in sources} == here
    assert isinstance(found[broken], DataError) and "not JSON" in str(found[broken])
    for source in sources:
        assert found[source].faults.keys() == {"3.png"}
        assert {p.kind for p in found[source].problems} == {"schema", "unreadable image"}


def test_a_second_start_reads_no_record_and_no_picture(own, files, tiny, monkeypatch):
    root, *sources = files
    vocabulary = tiny[1].vocabulary
    first = open_records(sources, root, vocabulary)

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(prepare_module, "read_list", never)
    monkeypatch.setattr(prepare_module, "_look_at", never)
    again = open_records(sources, root, vocabulary)
    for source in sources:
        assert again[source].problems == first[source].problems and len(again[source].problems) == 1


def test_what_changes_is_made_again(own, files, tiny, original):
    _, train, _ = files
    vocabulary, other = tiny[1].vocabulary, original.backbone.vocabulary
    ids = make_columns([train], vocabulary)[train].ids.tolist()
    assert make_columns([train], other)[train].ids.tolist() != ids, "another tokenizer"
    assert make_columns([RecordFile(train.path, "train", "first line")], vocabulary)
    assert len(list((own / "records").glob("*.safetensors"))) == 3
    records = json.loads(train.path.read_text())
    train.path.write_text(json.dumps(records[:10]))
    assert len(make_columns([train], vocabulary)[train]) == 9
    file = columns_file(train, vocabulary)
    file.write_bytes(file.read_bytes()[:100])
    assert len(make_columns([train], vocabulary)[train]) == 9, "a file that was cut short"


def test_a_picture_that_was_missing_is_used_when_it_is_there(own, files, tiny):
    root, train, _ = files
    vocabulary = tiny[1].vocabulary
    (root / "2.png").rename(root / "kept.png")
    found = open_records([train], root, vocabulary)[train]
    assert {p.kind for p in found.problems} == {"schema", "missing image"} and len(found.rows) < 89
    with pytest.raises(DataError, match=r"2\.png does not exist"):
        found.usable(unchecked=False)
    (root / "kept.png").rename(root / "2.png")
    assert len(open_records([train], root, vocabulary)[train].rows) == 89


def test_files_of_the_same_content_have_the_same_problems(own, files, monkeypatch):
    root, *_ = files
    sources = [RecordFile(root / name, "train", "last line") for name in ("one.json", "two.json", "whole.json")]
    for source in sources[:2]:
        source.path.write_text("<html>not found</html>")
    sources[2].path.write_bytes((root / "train.json").read_bytes())
    for alone in (prepare_module.ALONE, -1):  # here, and in processes of their own
        monkeypatch.setattr(prepare_module, "ALONE", alone)
        found = make_columns([*sources, sources[2]], None)
        assert list(found) == sources and len(found[sources[2]]) == 89
        for source in sources[:2]:
            assert isinstance(found[source], DataError) and str(found[source]).startswith(str(source.path))


def test_a_folder_that_may_not_be_listed_and_a_link_into_nowhere(own, files, tiny, monkeypatch):
    root, train, _ = files
    vocabulary = tiny[1].vocabulary

    def refuse(folder, listed=os.scandir):
        if folder == root:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.os, "scandir", refuse)
        assert len(open_records([train], root, vocabulary)[train].rows) == 89
    (root / "2.png").rename(root / "elsewhere.png")
    (root / "2.png").symlink_to(root / "elsewhere.png")
    assert len(open_records([train], root, vocabulary)[train].rows) == 89
    (root / "elsewhere.png").unlink()
    assert {p.kind for p in open_records([train], root, vocabulary)[train].problems} == {"schema", "missing image"}


def test_a_cache_that_cannot_be_written_to_is_named_with_the_remedy(own, files, tiny, monkeypatch):
    root, *sources = files
    (root / "file").write_text("")
    monkeypatch.setenv("LLACA_CACHE", str(root / "file"))
    with pytest.raises(OSError, match=r"cannot be written to .*set LLACA_CACHE to a folder that can"):
        make_columns(sources, tiny[1].vocabulary)


def test_a_column_of_texts():
    texts = ["", "a", "größer\n", "", "猫"]
    column = Texts.of(texts)
    assert list(column) == texts and len(column) == 5 and list(Texts.of([])) == []


def test_features_on_the_disk_are_those_computed(own, files, tiny):
    root, *_ = files
    model, backbone = tiny
    paths = [root / f"{number}.png" for number in range(4)]
    fresh = dict(zip(paths, backbone.tower_states(model, paths), strict=True))
    stored = backbone.vision_features(model, [paths[:3], paths[2:], []])
    assert all(torch.equal(stored(path), fresh[path]) for path in paths)
    made = {path: path.stat().st_mtime_ns for path in (own / "features").glob("*.safetensors")}
    assert len(made) == 2
    backbone.vision_features(model, [paths[:3]])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for path in made:
        path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(backbone.vision_features(model, [paths[:3]])(paths[0]), fresh[paths[0]])
    before = model.config.vision_config._attn_implementation
    model.set_attn_implementation("eager")
    backbone.vision_features(model, [paths[:3]])
    model.set_attn_implementation(before)
    assert len(list((own / "features").glob("*.safetensors"))) == 3, "another attention rounds otherwise"
    Image.new("RGB", (8, 8), "blue").save(paths[0])
    changed = backbone.vision_features(model, [paths[:3]])
    assert not torch.equal(changed(paths[0]), fresh[paths[0]]) and torch.equal(changed(paths[1]), fresh[paths[1]])


WORKER = """
import os, sys, time
from pathlib import Path
from data.cache import make_once

def make(file, partial):
    time.sleep(0.4)
    partial.write_text(str(os.getpid()))
    print(file.name, flush=True)

make_once([Path(name) for name in sys.argv[1:]], make)
"""


def test_processes_share_what_is_to_be_made(own, tmp_path):
    names = [str(own / f"{letter}.txt") for letter in "abcdef"]
    line = [sys.executable, "-c", WORKER, *names]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    several = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=around) for _ in range(3)]
    made = [process.communicate(timeout=60)[0].split() for process in several]
    assert sorted(name for own_names in made for name in own_names) == [f"{letter}.txt" for letter in "abcdef"]
    assert all(process.returncode == 0 for process in several) and max(map(len, made)) < 6


def test_the_right_of_a_killed_process_is_free_again(own):
    file = own / "a.txt"
    line = [sys.executable, "-c", WORKER.replace("0.4", "60"), str(file)]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 30
    while not (own / "a.txt.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    make_once([file], lambda _, partial: partial.write_text("made"))
    assert file.read_text() == "made"


@pytest.mark.parametrize("number", cache.NO_LOCKS)
def test_a_file_system_without_locks_is_no_hindrance(own, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    make_once([own / "a.txt"], lambda _, partial: partial.write_text("made"))
    assert (own / "a.txt").read_text() == "made"


def test_what_killed_processes_left_goes_and_all_may_read_what_is_made(own):
    (own / "a.txt.0123.partial").mkdir(parents=True)
    (own / "a.txt.0123.partial" / ".tmpV0XIBR").write_text("half")
    make_once([own / "a.txt"], lambda _, new: save_file({"a": torch.ones(1)}, new))
    assert not list(own.glob("*.partial"))
    (own / "plain").touch()
    assert (own / "a.txt").stat().st_mode == (own / "plain").stat().st_mode


def test_two_hosts_may_write_one_note_with_the_same_process_number(own):
    """Containers number their processes alike."""

    def write(new):
        new.write_text("outer")
        replace_whole(own / "note", lambda other: other.write_text("inner"))

    replace_whole(own / "note", write)
    assert (own / "note").read_text() == "outer"


def test_what_fails_leaves_nothing(own):
    def fail(_, partial):
        partial.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_once([own / "a.txt"], fail)
    assert not (own / "a.txt").exists() and not list(own.glob("*.partial"))
