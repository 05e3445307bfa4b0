"""Where things lie below a benchmark's root, CoIN's layout.

<root>/cl_dataset/                                   image root and official annotation files
<root>/Instructions[_Diverse|_10Type]/<Task>/        train.json, dev.json, and test.json or val.json
"""

from pathlib import Path

INSTRUCTION_FOLDERS = {
    "original": "Instructions",
    "diverse": "Instructions_Diverse",
    "10type": "Instructions_10Type",
}
OTHER_NAMES = {"OCR-VQA": ("OCRVQA",)}  # folder names of a task beside its own


def image_root(root: Path | str) -> Path:
    """The folder that a record's `image` is relative to."""
    return Path(root) / "cl_dataset"


def task_folder(root: Path | str, instructions: str, task: str) -> Path:
    """The task's folder below the instruction set. Raises ValueError or FileNotFoundError with the remedy."""
    if instructions not in INSTRUCTION_FOLDERS:
        known = ", ".join(INSTRUCTION_FOLDERS)
        raise ValueError(f"instruction set '{instructions}' is not known; choose one of {known}")
    parent = Path(root) / INSTRUCTION_FOLDERS[instructions]
    names = (task, *OTHER_NAMES.get(task, ()))
    for name in names:
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"{parent}: no folder {' or '.join(names)}; check the task's name and the data root")


def train_file(root: Path | str, instructions: str, task: str) -> Path:
    """The task's training file."""
    return task_folder(root, instructions, task) / "train.json"
