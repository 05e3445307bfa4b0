"""Pickles that cannot run code: lists, dictionaries, texts and numbers are read, anything else is refused."""

import pickle
from pathlib import Path
from typing import Any

# What reading a file that is no pickle, or a broken one, can end in; MemoryError where it misstates a length.
BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
)


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers only. What a pickle can run it must first name, and no name is admitted."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for every class or function that the pickle names; always raises UnpicklingError."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_plain(path: Path) -> list:
    """The non-empty list in a pickle, written by Python 2 or 3. Raises ValueError naming the file for any other."""
    try:
        with path.open("rb") as file:
            content = PlainUnpickler(file, encoding="utf-8").load()
    except BROKEN as error:
        raise ValueError(
            f"{path}: not a pickle of plain lists, dictionaries, texts and numbers ({error}); "
            "others can run code when read, so it was refused: take the official file"
        ) from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list with at least one entry; is it the official file?")
    return content
