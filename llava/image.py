"""Pictures: read from disk, padded to a square in CLIP's mean colour, resized and normalised for the vision tower."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaImageProcessorPil


def padding_processor(preprocessor: dict) -> LlavaImageProcessorPil:
    """Return LLaVA-1.5's image processor for the sizes, mean and deviation in a CLIP `preprocessor_config`."""
    keys = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return LlavaImageProcessorPil(do_pad=True, **{key: preprocessor[key] for key in keys if key in preprocessor})


def load_image(path: str | Path) -> Image.Image:
    """Return the picture at `path` in RGB. Raises OSError naming the file if it cannot be read."""
    with _opened(path) as image:
        return image.convert("RGB")


def verify_image(path: str | Path) -> None:
    """Check that `path` is a whole picture. Raises OSError naming the file if it is not.

    Pixels are decoded only where nothing else tells whether the file was cut short: a PNG has checksums, and a JPEG
    ends in a mark.
    """
    with _opened(path) as image:
        whole = image.format == "PNG" or (image.format == "JPEG" and _ends_in_mark(path))
        image.verify() if whole else image.load()


def _ends_in_mark(path: str | Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-2, 2)
        return file.read() == b"\xff\xd9"


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} cannot be read as a picture ({error}); replace the file or remove its record") from error


def to_pixels(image_processor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return `[len(images), 3, height, width]` normalised pixels, in float32, of RGB pictures of any size."""
    return image_processor(list(images), return_tensors="pt")["pixel_values"]
