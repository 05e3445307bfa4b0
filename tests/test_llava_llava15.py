"""Pixels against the original code's, bit for bit, and errors that name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import load_image, verify_image
from llava.backbones.llava15 import padding_processor, to_pixels


@pytest.mark.parametrize("number", [0, 1, 3])
def test_recorded_pixels_bit_for_bit(original, number):
    pixels = to_pixels(original.processor.image_processor, [load_image(original.samples[number].image)])
    assert torch.equal(pixels[0], original.tensors[f"pixel_values_{number}"])


def test_padding_is_the_mean_colour_and_centred():
    processor = padding_processor(
        {
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
            "image_mean": [0.5, 0.25, 0.1],
            "image_std": [1.0, 1.0, 1.0],
        }
    )
    pixels = to_pixels(processor, [Image.new("RGB", (8, 3), (255, 255, 255))])[0].numpy()
    background = (np.floor(np.array([0.5, 0.25, 0.1]) * 255) / 255 - [0.5, 0.25, 0.1])[:, None, None]
    white = (1 - np.array([0.5, 0.25, 0.1]))[:, None, None]
    rows = np.arange(8)
    band = (rows >= 2) & (rows < 5)  # floor((8 - 3) / 2) rows above
    expected = np.where(band[None, :, None], white, background) * np.ones((3, 8, 8))
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_other_modes_become_rgb(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    assert {load_image(tmp_path / name).mode for name in ("palette.png", "print.jpg")} == {"RGB"}


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:  # a picture whose second half is missing
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-800])
    else:
        path.write_bytes(content)
    for read in (load_image, verify_image):
        with pytest.raises(OSError, match=r"broken\.png cannot be read"):
            read(path)
