"""Picture files: opened in RGB, and looked at once before anything is trained on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = 120  # characters of a value that an error message shows


def load_image(path: str | Path) -> Image.Image:
    """Return the picture at `path` in RGB. Raises OSError naming the file if it cannot be read.

    Pixels of 16 bits are divided by 257, so that 65535 becomes 255. (Pillow, and so the original LLaVA, cuts them off
    at 255, which leaves a white picture.) Pixels of 32 bits have no stated range, and are refused.
    """
    with _opened(path) as image:
        return _rgb(image)


def size_of(path: str | Path) -> tuple[int, int]:
    """Return the width and height of the picture at `path`, from its header. Raises OSError as `load_image` does.

    Like its pixels they are those of the file: nothing is turned by an EXIF orientation.
    """
    with _opened(path) as image:
        return image.size


def verify_image(path: str | Path) -> None:
    """Check that `path` is a picture whose pixels can be decoded. Raises OSError naming the file if it is not.

    A JPEG is decoded at an eighth of its size, which reads all of its data; the checksums of a PNG are read, too.
    """
    with _opened(path) as image:
        if image.format == "PNG":
            image.verify()
    with _opened(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        if image.mode in ("I", "F"):
            _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range nobody states: save it with 8 bits a channel")
    return image.convert("RGB")


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "the file")
        raise OSError(
            f"{path} cannot be read as a picture ({reason}); replace the file or remove its record"
        ) from error


def shown(value: object) -> str:
    """Return a value as an error message shows it: on one line and not longer than SHORT characters."""
    text = repr(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}... ({len(text):,} characters)"
