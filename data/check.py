"""Checks a benchmark before anything is trained on it: every record and picture of training and of evaluation."""

from pathlib import Path

from tqdm import tqdm

from data.layout import image_root, train_file
from eval.tasks import TASKS
from llava.dataset import load_questions, load_samples


def check_benchmark(root: Path | str, instructions: str, tasks: list[str]) -> dict[str, tuple[int, int]]:
    """(training records, test questions) of every task.

    Raises DataError for broken records (file, record, remedy), ValueError for an unknown task or a broken annotation
    file, FileNotFoundError for what is missing.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"task '{unknown[0]}' is not known; choose from {', '.join(TASKS)}")
    counts = {}
    for name in tqdm(tasks, desc="check records", leave=False, delay=3, unit="task"):
        samples = load_samples(train_file(root, instructions, name), image_root(root))
        questions = load_questions(TASKS[name].question_file(root, instructions), image_root(root))
        TASKS[name].load_references(root, instructions)
        counts[name] = (len(samples), len(questions))
    return counts
