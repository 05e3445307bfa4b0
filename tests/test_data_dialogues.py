"""Dialog-mini: answers that the dialogues bear out, the benchmark on disk, and how its base learns."""

import filecmp
import json
import random
import re
from pathlib import Path

import pytest

from data.benchmark import open_benchmark
from data.check import check
from data.mini import text_stream
from data.mini.dialogues import FIRST, GOODS, KIND_OF, NUMBERS, TASKS, WORDS
from llaca.config import load_recipe
from scripts.tiny_t5 import MARKS, TinyT5, corrupted

GOODBYES = ("Good, I take them.", "Fine, that is a fair price.", "Yes, here is the money.")


def made(task: str, count: int = 200):
    rng = random.Random(task)
    return [TASKS[task].make(rng) for _ in range(count)]


def read(dialogue: str) -> dict[str, str]:
    """What a reader of the words finds in a whole dialogue."""
    found = re.search(
        r"(?:I am (\w+)\. Do you have|Hi, (\w+) here\. I want to see) (\w+) (\w+)[?.]\n.*\n"
        r"Customer: (?:I need |Give me )?(\w+)(?: of them)?\.\n.* (\w+) coins\.\nCustomer: (.*)",
        dialogue,
    )
    first, second, color, item, count, price, last = found.groups()
    return {"name": first or second, "color": color, "item": item, "count": count, "price": price, "last": last}


def test_answers_are_those_that_the_dialogue_bears_out():
    for asked, said in made("mini1_goods_answer_generation"):
        assert read(asked)[re.search(r"Question: What is the (\w+)\?", asked)[1]] == said
    for asked, said in made("mini2_deal_classification"):
        assert said == ("deal" if read(asked)["last"] in GOODBYES else "no deal")
    for asked, said in made("mini4_seller_reply_generation"):
        found = read(asked)
        assert said.startswith("Seller: Thank you" if found["last"] in GOODBYES else "Seller: What a pity")
        assert found["name"] in said and found["item"] in said
    for asked, said in made("mini5_order_facts_generation"):
        told = dict(pair.split(" = ") for pair in said.split("; "))
        assert told == {key: read(asked)[key] for key in ("item", "color", "count", "price")}
    for asked, said in made("mini6_kind_classification"):
        assert said == f"goods of kind {KIND_OF[read(asked)['item']]}"


def test_sentences_tell_the_facts_and_replies_follow():
    for task in ("mini3_order_sentence_generation", "mini7_customer_utterance_generation"):
        for asked, said in made(task):
            facts = dict(pair.split(": ") for pair in asked.split(", "))
            assert all(value in re.findall(r"\w+", said) for value in facts.values())
    for asked, said in made("mini8_choose_next"):
        spoken, _, listed = asked.partition("\nReplies:\n")
        assert said in listed.split("\n") and len(set(listed.split("\n"))) == 3
        turns = spoken.count("\n") + 1
        kind = {2: r"\w+( \w+)*\.$", 3: r".* coins\.$", 5: r"(Thank you|What a pity) "}[turns]
        assert re.match(rf"\(\d\) {kind}", said)
    kinds = {said for _, said in made("mini6_kind_classification")}
    assert len(kinds) == len(GOODS), "every kind is asked for"


def test_what_is_learnt_before_gives_nothing_of_the_stream_away():
    definitions = {text for task in TASKS.values() for text in task.definitions}
    assert not definitions & {text for task in FIRST.values() for text in task.definitions}
    rng = random.Random(0)
    simple = {said for task in FIRST.values() for said in (task.make(rng)[1] for _ in range(300))}
    words = set(WORDS)
    for name in TASKS:
        answers = {said for _, said in made(name)}
        assert not {said for said in answers & simple if said not in words}, name
    assert len(set(WORDS)) == len(WORDS) and set(NUMBERS) <= words


def test_the_benchmark_is_a_function_of_the_seed_and_its_splits_share_nothing(tmp_path):
    one, again, other = (tmp_path / name for name in ("one", "again", "other"))
    assert text_stream.build(one, 3) and text_stream.build(again, 3) and text_stream.build(other, 4)
    assert not text_stream.build(one, 3) and text_stream.is_built(one) and not text_stream.is_built(tmp_path)
    with pytest.raises(FileExistsError, match=r"is not Dialog-mini version 1 of seed 4 .*differs in seed"):
        text_stream.build(one, 4)
    files = sorted(path.relative_to(one) for path in one.rglob("*.json"))
    assert filecmp.cmpfiles(one, again, files, shallow=False)[0] == files
    report = check(open_benchmark(one), "original")
    assert report.ok and report.records == 8 * (1000 + 100)
    for task in TASKS:
        rows = {split: json.loads((one / "tasks" / task / f"{split}.json").read_text()) for split in ("train", "test")}
        asked = [row["conversations"][0]["value"] for row in rows["train"]] + [row["text"] for row in rows["test"]]
        assert len(set(asked)) == len(asked) == 1100
        theirs = (other / "tasks" / task / "test.json").read_text()
        assert (one / "tasks" / task / "test.json").read_text() != theirs


def test_its_recipe_can_be_read_before_it_is_made(tmp_path, monkeypatch):
    config = (Path(__file__).parents[1] / "configs" / "dialog_mini_t5.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(["--recipe", str(config), "--method", "lora"]).stream.tasks == list(TASKS)


def test_a_text_with_gaps_and_what_fills_them_are_the_text():
    rng, marks = random.Random(0), list(range(-1, -17, -1))
    gone, lengths = 0, 0
    for _ in range(500):
        text = [rng.randrange(100) for _ in range(rng.randint(2, 120))]
        left, said = corrupted(text, marks, rng)
        fills, current = {}, None
        for token in said:
            if token < 0:
                current = fills.setdefault(token, [])
            else:
                current.append(token)
        assert [token for at in left for token in (fills[at] if at < 0 else [at])] == text
        assert said[-1] < 0 and not fills[said[-1]] and all(fill for mark, fill in fills.items() if mark != said[-1])
        gone, lengths = gone + sum(map(len, fills.values())), lengths + len(text)
    assert 0.13 < gone / lengths < 0.17


def test_every_word_has_a_token(tmp_path):
    family = TinyT5(tmp_path)
    family.write(tmp_path)
    family.read()
    assert len(family.marks) == len(set(family.marks)) == MARKS
    rng, unknown = random.Random(1), family.tokenizer.unk_token_id
    for task in (*TASKS.values(), *FIRST.values()):
        for _ in range(100):
            for text in task.make(rng):
                ids = family.tokenizer(text).input_ids
                assert unknown not in ids
                assert family.tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.split())
