"""Captions: words against what Stanford's tokenizer gave, scores against pycocoevalcap's own interface."""

import json

import pytest
import yaml
from pycocoevalcap.cider.cider import Cider

from eval.score import QuestionSet, majority_score, score_task
from eval.tasks import task_of
from eval.tasks.caption import caption_words

# caption, what PTBTokenizer of Stanford CoreNLP 3.4.1 (pycocoevalcap 1.2, Java 17) makes of it
PTB = [
    ("A man's hat, a woman's dog and the boys' toys.", "a man 's hat a woman 's dog and the boys toys"),
    ("Don't walk: it isn't safe (at night)!", "do n't walk it is n't safe -lrb- at night -rrb-"),
    ("Two well-dressed men - one in a T-shirt - talk.", "two well-dressed men one in a t-shirt talk"),
    ("She'll say \"hello\" to 3 dogs; they're 2.5 years old.", "she 'll say hello to 3 dogs they 're 2.5 years old"),
    ('A "stop" sign reads STOP... or does it?', "a stop sign reads stop or does it"),
    ("The U.S. flag costs $4.50 & 10% more.", "the u.s. flag costs $ 4.50 & 10 % more"),
    ("I can't see what's in 1,000 pictures/photos", "i ca n't see what 's in 1,000 pictures/photos"),
    ("A cat", "a cat"),
    ("A red-and-white bus's door; cannot open", "a red-and-white bus 's door can not open"),
    ("It's 10:30 a.m. at St. Mary's -- isn't it?", "it 's 10:30 a.m. at st. mary 's is n't it"),
    ("café tables by the naïve painter's studio", "café tables by the naïve painter 's studio"),
    ("Black/white photo of a dog's 1980's collar", "black/white photo of a dog 's 1980 's collar"),
]
DIFFERENT = [
    ("Mail a@b.com", "mail a@b.com", "mail a @ b.com"),
    ("rock 'n' roll kids' stuff", "rock 'n' roll kids stuff", "rock 'n roll kids stuff"),
]
CAPTIONS = {
    "1": ["A dog runs on the beach.", "A brown dog is running along the shore"],
    "2": ["Two men play chess in a park", "Men playing chess outside", "A chess game between two men"],
    "3": ["A red bus waits at the stop", "The bus stands at a bus stop"],
}


@pytest.fixture
def folder(tmp_path):
    """A benchmark of one captioned set."""
    spec = {"name": "Captions", "tasks": {"C": {"scoring": "caption"}}}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "C").mkdir()
    asked = [{"question_id": key, "text": "Describe it.", "answers": said} for key, said in CAPTIONS.items()]
    (tmp_path / "C" / "test.json").write_text(json.dumps(asked))
    turns = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "A dog runs on the beach."}]
    (tmp_path / "C" / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    return tmp_path


@pytest.mark.parametrize(("text", "words"), PTB)
def test_words_are_those_of_stanfords_tokenizer(text, words):
    assert caption_words(text) == words


@pytest.mark.parametrize(("text", "theirs", "ours"), DIFFERENT)
def test_where_they_are_not(text, theirs, ours):
    assert caption_words(text) == ours != theirs


def test_scores_are_the_librarys_and_a_missing_answer_counts_as_a_picture(folder):
    given = {"1": "A dog is running on a beach", "2": "Two men play chess in a park"}
    rows = [{"question_id": key, "text": text} for key, text in given.items()]
    found = score_task(rows, QuestionSet(folder, "C"))
    gts = {key: [caption_words(one) for one in said] for key, said in CAPTIONS.items()}
    mean, each = Cider().compute_score(gts, {key: [caption_words(given.get(key, ""))] for key in CAPTIONS})
    assert [found.per_question[key]["official"] for key in CAPTIONS] == pytest.approx([v / 10 for v in each])
    assert found.accuracy == {mode: pytest.approx(10 * mean) for mode in ("official", "legacy", "lenient")}
    assert found.missing == 1 and each[2] == 0 and found.n == 3
    part = Cider().compute_score({k: gts[k] for k in given}, {k: [caption_words(given[k])] for k in given})[1]
    assert part[0] != pytest.approx(each[0]), "a part of the set scores otherwise"
    accuracy, answers = majority_score(QuestionSet(folder, "C"))
    assert accuracy > 0 and {row["text"] for row in answers.rows} == {"A dog runs on the beach."}


def test_short_captions_cannot_reach_the_highest_score(folder):
    task = task_of(folder, "C")
    words = ["one", "two men", "three small dogs", "four very small dogs", "a house with a roof"]
    scores = task.official_scores(words, [(text,) for text in words], [])
    assert scores == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    with pytest.raises(TypeError, match="a whole test set"):
        task.official("a dog", ("a dog",))
    assert task.right_answer(("a", "b")) == "a | b"
