"""Pictures padded to a square in CLIP's mean colour, resized and normalised for the vision tower."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import LlavaImageProcessorPil


def padding_processor(preprocessor: dict) -> LlavaImageProcessorPil:
    """Return LLaVA-1.5's image processor for the sizes, mean and deviation in a CLIP `preprocessor_config`."""
    keys = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return LlavaImageProcessorPil(do_pad=True, **{key: preprocessor[key] for key in keys if key in preprocessor})


def to_pixels(image_processor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return `[len(images), 3, height, width]` normalised pixels, in float32, of RGB pictures of any size."""
    return image_processor(list(images), return_tensors="pt")["pixel_values"]
