"""Every kind of broken record is refused by name, and whole ones become the batches the model expects."""

import copy
import json

import pytest
import torch
from PIL import Image

from data.records import IMAGE, DataError, load_questions, load_samples
from llava.conversation import IGNORE, encode
from llava.dataset import Collator, InstructionDataset

RECORD = {
    "id": "r1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "dog"}],
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    return tmp_path


def write(folder, content):
    path = folder / "train.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(**changes):
    record = copy.deepcopy(RECORD) | changes
    return {key: value for key, value in record.items() if value is not None}


def turns(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


BROKEN = {
    r"image '\.\./a\.png' leads out of the image root": changed(image="../a.png"),
    "image '/etc/a.png' leads out of the image root": changed(image="/etc/a.png"),
    r"no\.png does not exist": changed(image="no.png"),
    r"bad\.png cannot be read as a picture": changed(image="bad.png"),
    "image is 7": changed(image=7),
    "has no conversations": changed(conversations=[]),
    "no conversations; add": changed(conversations=None),
    r"roles are \['gpt', 'human'\]": changed(conversations=turns("a", "b", "c")[1:]),
    r"roles are \['human', 'gpt', 'human'\]": changed(conversations=turns("a", "b", "c")),
    r"roles are \['human', None\]": changed(conversations=[{"from": "human", "value": "x"}, "gpt"]),
    "a turn has no text": changed(conversations=turns("a", 5)),
    "answer 2 is empty": changed(conversations=turns("<image>a", "b", "c", " \n")),
    "question 1 is empty": changed(conversations=turns(" ", "b")),
    "answer 1 holds <image>": changed(conversations=turns("a", "<image>")),
    "question 1 holds <image> but there is no image": changed(image=None),
    "2 questions hold <image>": changed(conversations=turns("<image>a", "b", "<image>c", "d")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_record_is_named_with_file_and_remedy(folder, message):
    path = write(folder, [RECORD, BROKEN[message]])
    with pytest.raises(DataError, match=message) as error:
        load_samples(path, folder)
    text = str(error.value)
    assert str(path) in text and "record 1 (id 'r1')" in text and "record 0" not in text
    assert ";" in text.splitlines()[1]  # what is wrong; what to do


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1},\n {"id" 2}]', "not JSON: .* at line 2, column 8"),
        ('{"id": 1}', "not a list of records"),
        ("[]", "or an empty one"),
        ('["text"]', "record 0: is not an object"),
    ],
)
def test_broken_file(folder, content, message):
    with pytest.raises(DataError, match=message):
        load_samples(write(folder, content), folder)


def test_missing_file(folder):
    with pytest.raises(DataError, match=r"nowhere\.json.*\n.*cannot be read"):
        load_samples(folder / "nowhere.json", folder)


def test_many_problems_come_together_and_are_counted(folder):
    with pytest.raises(DataError) as error:
        load_samples(write(folder, [changed(image="no.png", id=f"n{n}") for n in range(25)]), folder)
    lines = str(error.value).splitlines()
    assert "25 problem(s)" in lines[0] and len(lines) == 22 and "and 5 more" in lines[-1]
    assert len(error.value.problems) == 25


def test_whole_records(folder):
    long = turns("a b", "c", "<image>\nd  e", "f")
    records = [
        RECORD,
        changed(image="./a.png", conversations=long),
        changed(image=None, conversations=turns("q", "r s"), id=None),
        changed(conversations=turns("no mark", "x")),
    ]
    samples = load_samples(write(folder, records), folder)
    assert [sample.image for sample in samples] == [folder / "a.png", folder / "a.png", None, folder / "a.png"]
    assert samples[1].turns == (("a b", "c"), ("<image>\nd  e", "f"))
    assert samples[2].id == "2"
    assert samples[3].turns == (("<image>\nno mark", "x"),)
    assert [sample.words for sample in samples] == [3, 7, 3, 3]


def test_questions(folder):
    records = [
        {"question_id": 4, "image": "a.png", "text": "<image>\nq\n", "answer": "z"},
        {"question_id": "b", "text": "plain\n"},
        {"question_id": "c", "text": "<image>\nno picture here"},
        {"question_id": "d", "image": "a.png", "text": "  kept as it is "},
    ]
    questions = load_questions(write(folder, records), folder)
    assert [question.text for question in questions] == [
        "<image>\nq",
        "plain\n",
        "no picture here",
        "<image>\n  kept as it is ",
    ]
    assert questions[0].asked == "<image>\nq\n" and questions[0].image == folder / "a.png"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question_id": "1", "text": "twice"}, r"record 1 \(question_id '1'\): record 0 has this id too"),
        ({"text": "x"}, "record 1: has no question_id"),
        ({"question_id": 2.5, "text": "x"}, "has no question_id"),
        ({"question_id": 2, "text": "<image>"}, r"record 1 \(question_id 2\): has no text"),
        ({"question_id": 2, "text": "x", "image": "no.png"}, r"no\.png does not exist"),
    ],
)
def test_broken_questions(folder, record, message):
    with pytest.raises(DataError, match=message):
        load_questions(write(folder, [{"question_id": 1, "text": "q"}, record]), folder)


def test_items_equal_the_encoding_of_their_turns(tiny, tiny_data):
    backbone = tiny[1]
    samples = load_samples(tiny_data / "train.json", tiny_data)
    dataset = InstructionDataset.of_samples(samples, backbone, max_length=512)
    assert len(dataset) == 16 and dataset.modality_lengths[9:11] == [15, -4]
    for sample, item in zip(samples, dataset, strict=True):
        encoded = encode(backbone.vocabulary, sample.turns, 36, 512)
        assert item["input_ids"].tolist() == encoded.input_ids and item["labels"].tolist() == encoded.labels
        assert ("pixel_values" in item) == (sample.image is not None)
    assert dataset[3]["pixel_values"].shape == (3, 48, 48)


def test_cut_counts_the_picture_and_names_the_record(tiny, tiny_data):
    backbone = tiny[1]
    samples = load_samples(tiny_data / "train.json", tiny_data)[:4]
    whole = InstructionDataset.of_samples(samples, backbone, 512)
    limit = len(whole[3]["labels"]) - 1
    cut = InstructionDataset.of_samples(samples, backbone, limit)
    assert torch.equal(cut[3]["input_ids"], whole[3]["input_ids"][:limit])
    first = int((whole[0]["labels"] != IGNORE).nonzero()[0])
    with pytest.raises(DataError, match=r"t\.json: 4 problem.*\n  record 0 \(id 'p0'\): the maximum length leaves no"):
        InstructionDataset.of_samples(samples, backbone, first, source="t.json")


def test_batches_mask_by_length_and_stack_the_pictures_there_are(tiny):
    items = [
        {"input_ids": torch.tensor([1, 0, 5]), "labels": torch.tensor([IGNORE, 0, 5])},
        {"input_ids": torch.tensor([1, 7]), "labels": torch.tensor([IGNORE, 7]), "pixel_values": torch.ones(2)},
    ]
    batch = Collator(tiny[1])(items)
    assert batch["input_ids"].tolist() == [[1, 0, 5], [1, 7, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 0, 5], [IGNORE, 7, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["pixel_values"].tolist() == [[1.0, 1.0]]
    assert "pixel_values" not in Collator(tiny[1])(items[:1])


def test_a_mixed_batch_gives_each_sample_its_own_logits(tiny, tiny_data):
    model, backbone = tiny
    samples = load_samples(tiny_data / "train.json", tiny_data)
    dataset = InstructionDataset.of_samples([samples[n] for n in (3, 12, 5, 15)], backbone, 512)
    collate = Collator(backbone)
    with torch.no_grad():
        together = model(**collate(list(dataset)))
        for row, item in enumerate(dataset):
            alone = model(**collate([item])).logits[0]
            torch.testing.assert_close(together.logits[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_text_mentioning_the_picture_is_moved_only_once(folder):
    [sample] = load_samples(write(folder, [changed(conversations=turns("What <image> is it?", "x"))]), folder)
    assert sample.turns[0][0].count(IMAGE) == 1
