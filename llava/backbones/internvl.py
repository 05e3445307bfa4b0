"""InternVL 2.5, 3 and 3.5 as transformers has them (arXiv 2504.10479): pictures cut into tiles, asked in ChatML.

A picture is resized to a grid of square tiles whose shape is nearest to its own; if there are several, the whole
picture follows as one more. Every tile takes the same number of positions, so how many a picture takes follows from its
size. The language model is a Qwen2 or Qwen3. What trains is LoRA on every linear layer of its blocks and, unless a
recipe freezes it, the projector.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from data.pictures import load_image
from data.sizes import picture_sizes
from llava.backbone import Backbone, embeddings_plus, unwrapped
from llava.backbones.chatml import CHATML
from llava.backbones.qwen_vl import check_words, read_parts

LANGUAGES = ("qwen2", "qwen3")


class Processor(NamedTuple):
    """What the stock processor puts together, without the one for videos, which needs torchvision."""

    image_processor: GotOcr2ImageProcessorPil
    tokenizer: PreTrainedTokenizerBase


class InternVL(Backbone):
    """InternVLForConditionalGeneration, without a system prompt, as its chat template has none."""

    model_class = InternVLForConditionalGeneration
    config_class = InternVLConfig
    template = replace(CHATML, system="", placeholder="<IMG_CONTEXT>", before="<img>", after="</img>\n")
    lora_targets = r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    connector = ("multi_modal_projector",)
    unquantized = ("model.vision_tower", "model.multi_modal_projector", "lm_head")

    @classmethod
    def read_processor(cls, path: Path, config: InternVLConfig) -> Processor:
        """As `Backbone.read_processor`. Raises ValueError for a language model that is no Qwen."""
        if config.text_config.model_type not in LANGUAGES:
            raise ValueError(
                f"{path}: the language model is {config.text_config.model_type}; take an InternVL whose language model "
                f"is one of {', '.join(LANGUAGES)}"
            )
        tokenizer, pictures = read_parts(path, GotOcr2ImageProcessorPil)
        check_words(path, tokenizer, cls.template.placeholder, config)
        tile, sees = (pictures.size["height"], pictures.size["width"]), tuple(config.vision_config.image_size)
        if tile != sees:
            raise ValueError(f"{path}: the image processor makes tiles of {tile} pixels, the vision tower takes {sees}")
        pictures.crop_to_patches = True  # as the stock processor asks it to
        return Processor(pictures, tokenizer)

    def bound_pixels(self, least: int, most: int) -> None:
        """As `Backbone.bound_pixels`, in whole tiles."""
        if self.processor is None:
            return
        pictures, tile = self.processor.image_processor, int(np.prod(self.config.vision_config.image_size))
        fewest, largest = -(-least // tile) or pictures.min_patches, most // tile if most else pictures.max_patches
        if not 1 <= fewest <= largest:
            raise ValueError(
                f"min_pixels {least} and max_pixels {most}: a tile takes {tile} pixels, and pictures would take from "
                f"{fewest} to {largest} tiles; correct them"
            )
        pictures.min_patches, pictures.max_patches = fewest, largest

    @property
    def _tile_tokens(self) -> int:
        """Positions that one tile takes."""
        vision = self.config.vision_config
        patches = np.prod(np.array(vision.image_size) // np.array(vision.patch_size))
        return int(patches * self.config.downsample_ratio**2)

    def picture_tokens(self, root: Path, names: Sequence[str]) -> np.ndarray:
        """Those of the tiles that a picture of its size is cut into."""
        distinct, places = np.unique(picture_sizes(root, names), axis=0, return_inverse=True)
        pictures = self.processor.image_processor
        tiles = [
            pictures.get_number_of_image_patches(height, width) if width else 0 for width, height in distinct.tolist()
        ]
        counts = [count * self._tile_tokens if count else 1 for count in tiles]
        return np.array(counts, np.int32)[places.reshape(-1)]

    def picture(self, path: Path) -> dict[str, Tensor]:
        """`pixel_values`: [tiles, 3, height, width]."""
        return {"pixel_values": self.processor.image_processor([load_image(path)], return_tensors="pt")["pixel_values"]}

    def stack(self, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All tiles [tiles of all, 3, height, width]."""
        return {"pixel_values": torch.cat([picture["pixel_values"] for picture in pictures])}

    def tokens_of(self, picture: Mapping[str, Tensor]) -> int:
        """Those of its tiles."""
        return len(picture["pixel_values"]) * self._tile_tokens

    @contextmanager
    def without_picture(self, model: nn.Module) -> Iterator[None]:
        """Sends a blank tile through tower and projector and adds nothing of it (see `Llava15.without_picture`)."""
        owner, size = unwrapped(model).model, self.config.vision_config.image_size

        def nothing(embeddings: Tensor) -> Tensor:
            blank = torch.zeros(1, 3, *size, device=embeddings.device, dtype=owner.dtype)
            return owner.get_image_features(blank, return_dict=True).pooler_output.sum() * 0.0

        with embeddings_plus(model, nothing):
            yield

    def connect(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> None:
        """The projector on records that are pictures all over, since a picture may take any number of tiles."""
        projector = unwrapped(model).model.multi_modal_projector
        projector(torch.empty(records * tokens, projector.linear_1.in_features, dtype=dtype, device="meta").float())

    def language(self, model: nn.Module) -> nn.Module:
        """The Qwen."""
        return unwrapped(model).model.language_model

    @property
    def silent(self) -> list[int]:
        """None: in the stock loss all rows take part, the placeholder's and those beyond the vocabulary."""
        return []
