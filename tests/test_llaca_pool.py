"""The pool: the paper's Algorithm 1 on the paper's instructions."""

import json
from pathlib import Path

import pytest

from llaca.grouping import THRESHOLDS, Codebook
from llaca.pool import Pool

FACTS = json.loads((Path(__file__).parents[1] / "data" / "instructions.json").read_text())
ORDER = FACTS["orders"]["original"]


def walk(which: str, grouping: bool = True, start: str = "latest") -> tuple[Pool, dict[str, str | None]]:
    """The pool after the whole stream, and each task's start."""
    pool, starts = Pool(grouping, Codebook(THRESHOLDS[which]), start), {}
    for task in ORDER:
        instructions = FACTS["instructions"][task][which]
        choice = pool.choose(instructions)
        starts[task] = choice.start
        pool.put(choice, instructions, task, f"after {task}")
    return pool, starts


@pytest.mark.parametrize("which", THRESHOLDS)
def test_members_are_the_papers_groups(which):
    assert walk(which)[0].members == FACTS["groups"][which]


def test_starts_are_those_of_the_released_scripts():
    """A new group starts from the latest parameters, a matched task from its group's: GQA skips ImageNet."""
    before = {"ScienceQA": None, "TextVQA": "ScienceQA", "ImageNet": "TextVQA", "GQA": "TextVQA", "VizWiz": "GQA"}
    before |= {"Grounding": "VizWiz", "VQAv2": "VizWiz", "OCR-VQA": "VQAv2"}
    assert walk("original")[1] == {task: source and f"after {source}" for task, source in before.items()}


def test_a_new_group_may_start_fresh():
    starts = walk("original", start="fresh")[1]
    assert [task for task in ORDER if starts[task] is None] == ["ScienceQA", "TextVQA", "ImageNet", "Grounding"]


def test_after_the_stream_each_test_set_gets_its_groups_parameters():
    pool, _ = walk("original")
    holders = {task: pool.holder_for(FACTS["instructions"][task]["original"], task) for task in ORDER}
    own = ("ScienceQA", "ImageNet", "Grounding")
    assert holders == {task: (f"after {task if task in own else 'OCR-VQA'}", True) for task in ORDER}
    assert pool.holder_for(["Answer with a single letter"], "ScienceQA")[1] is False


def test_without_grouping_there_is_one_set():
    pool, starts = walk("diverse", grouping=False)
    assert list(starts.values()) == [None, *[f"after {task}" for task in ORDER[:-1]]]
    assert pool.holder_for(["anything"], "GQA") == ("after OCR-VQA", True) and pool.members == [ORDER]


def test_json_round_trip():
    pool, _ = walk("10type")
    assert Pool.from_json(pool.to_json()).to_json() == pool.to_json()


def test_an_oracle_has_parameters_for_every_task_and_knows_the_task():
    pool = Pool(False, Codebook(0.9), "fresh", oracle=True)
    for task in ("GQA", "VizWiz"):
        choice = pool.choose(["the same instruction"])
        assert (choice.group, choice.start) == (None, None)
        pool.put(choice, ["the same instruction"], task, f"after {task}")
    assert pool.holder_for(["whatever"], "GQA") == ("after GQA", True)
    assert pool.holder_for(["whatever"], "VQAv2") == ("after VizWiz", False)
    assert Pool.from_json(pool.to_json()).oracle


def test_an_oracle_keeps_every_task_apart_with_grouping_too():
    pool = Pool(True, Codebook(0.9), "fresh", oracle=True)
    for task in ("TextVQA", "GQA", "VQAv2"):
        pool.put(pool.choose(["the same instruction"]), ["the same instruction"], task, f"after {task}")
    assert [pool.holder_for(["the same instruction"], task)[0] for task in ("TextVQA", "GQA")] == [
        "after TextVQA",
        "after GQA",
    ]
    assert pool.members == [["TextVQA"], ["GQA"], ["VQAv2"]]


def test_the_same_instructions_are_one_group_however_little_alike_they_are():
    """Their mean similarity, 1/3, is below the threshold: without the rule a task would overwrite a group that it did
    not start from."""
    pool, own = Pool(True, Codebook(0.9)), ["draw a box", "name the animal", "read the word"]
    for task in ("A", "B"):
        choice = pool.choose(own)
        pool.put(choice, own, task, f"after {task}")
    assert (choice.group, choice.start) == (0, "after A") and choice.scores == [pytest.approx(1 / 3)]
    assert pool.members == [["A", "B"]] and pool.holder_for(own, "A") == ("after B", True)
