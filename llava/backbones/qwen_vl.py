"""Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631): pictures in the size they have, asked in ChatML.

A picture takes as many positions as its size says, within two bounds of pixels, and lies in a plane: its tokens have
a row and a column, and the text behind it goes on after the longer side. What trains is LoRA on every linear layer of
the language model's blocks and, unless a recipe freezes them, the modules that merge patches into tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from data.pictures import load_image
from data.sizes import picture_sizes
from llava.backbone import AS_IS, Backbone, BaseOptions, embeddings_plus, unwrapped
from llava.backbones.chatml import CHATML
from llava.files import check_file, check_tokenizer

TOO_LONG = "one side is more than 200 times as long as the other, which this base model refuses; crop the picture"


class Processor(NamedTuple):
    """What the stock processors put together, without the one for videos, which needs torchvision."""

    image_processor: Qwen2VLImageProcessorPil
    tokenizer: PreTrainedTokenizerBase


class QwenVL(Backbone):
    """What Qwen2.5-VL and Qwen3-VL share. Pictures are resized to multiples of a merged patch, never turned."""

    lora_targets = r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    unquantized = ("model.visual", "lm_head")
    connector = ("visual.merger",)

    @classmethod
    def read_processor(cls, path: Path, config: PreTrainedConfig) -> Processor:
        """As `Backbone.read_processor`."""
        tokenizer, pictures = read_parts(path, Qwen2VLImageProcessorPil)
        check_words(path, tokenizer, CHATML.placeholder, config)
        vision = config.vision_config
        for key, wanted in (
            ("patch_size", vision.patch_size),
            ("temporal_patch_size", vision.temporal_patch_size),
            ("merge_size", vision.spatial_merge_size),
        ):
            if getattr(pictures, key) != wanted:
                raise ValueError(f"{path}: the image processor has {key} {getattr(pictures, key)}, the model {wanted}")
        return Processor(pictures, tokenizer)

    def bound_pixels(self, least: int, most: int) -> None:
        """As `Backbone.bound_pixels`."""
        if self.processor is None:
            return
        size = dict(self.processor.image_processor.size)
        size["shortest_edge"], size["longest_edge"] = least or size["shortest_edge"], most or size["longest_edge"]
        least, most = size["shortest_edge"], size["longest_edge"]
        if not self._side**2 <= least <= most:
            raise ValueError(
                f"min_pixels {least} and max_pixels {most}: a picture takes {self._side**2} pixels at least, and the "
                "first is at most the second; correct them"
            )
        self.processor.image_processor.size = size

    @property
    def _side(self) -> int:
        """Pixels along the square that becomes one token."""
        return self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height in pixels that the model sees of a picture of this size. Raises ValueError for
        one that it cannot take."""
        size = self.processor.image_processor.size
        height, width = smart_resize(height, width, self._side, size["shortest_edge"], size["longest_edge"])
        return width, height

    def picture_tokens(self, root: Path, names: Sequence[str]) -> np.ndarray:
        """One token for each merged patch of the resized picture."""
        distinct, places = np.unique(picture_sizes(root, names), axis=0, return_inverse=True)
        return np.array([self._tokens(*size) for size in distinct.tolist()], np.int32)[places.reshape(-1)]

    def _tokens(self, width: int, height: int) -> int:
        try:
            width, height = self.resized(width, height)
        except (ValueError, ZeroDivisionError):
            return 1
        return width * height // self._side**2

    def picture_faults(self, root: Path, names: Sequence[str]) -> dict[int, str]:
        """Pictures that are much longer than wide."""
        sizes = picture_sizes(root, names)
        bad = np.flatnonzero(sizes.max(1, initial=0) > 200 * sizes.min(1, initial=1 << 30))
        return {int(place): TOO_LONG for place in bad if sizes[place].min() > 0}

    def picture(self, path: Path) -> dict[str, Tensor]:
        """`pixel_values` [patches, values of a patch] and `image_grid_thw` [3]: one frame, rows and columns of
        patches."""
        image = load_image(path)
        try:
            found = self.processor.image_processor([image], return_tensors="pt")
        except ValueError as error:
            raise OSError(f"{path} cannot be used ({error}); crop or replace it, or remove its record") from error
        return {"pixel_values": found["pixel_values"], "image_grid_thw": found["image_grid_thw"][0]}

    def stack(self, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All patches [patches of all, values], and the grids [pictures, 3]."""
        return {
            "pixel_values": torch.cat([picture["pixel_values"] for picture in pictures]),
            "image_grid_thw": torch.stack([picture["image_grid_thw"] for picture in pictures]),
        }

    def tokens_of(self, picture: Mapping[str, Tensor]) -> int:
        """A token for each merged patch."""
        return int(picture["image_grid_thw"].prod()) // self.config.vision_config.spatial_merge_size**2

    def beside_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """`mm_token_type_ids` [rows, tokens], 1 where a picture is: without them the model takes a picture's tokens for
        a line of text, Qwen2.5-VL without a word."""
        types = (ids == self.placeholder).long()
        if not types.any():
            raise ValueError("there are pictures, and no token that stands for one")
        return {"mm_token_type_ids": types}

    def positions_saved(self, pictures: Mapping[str, Tensor]) -> Tensor:
        """A picture of r x c tokens takes max(r, c) positions."""
        grid = pictures["image_grid_thw"][:, 1:] // self.config.vision_config.spatial_merge_size
        return grid.prod(1) - grid.amax(1)

    @contextmanager
    def without_picture(self, model: nn.Module) -> Iterator[None]:
        """Sends one merged patch of zeros through tower and mergers and adds nothing of it: then all ranks gather the
        same weights and reduce the same gradients in the same order (see `Llava15.without_picture`)."""
        owner, vision = unwrapped(model).model, self.config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

        def nothing(embeddings: Tensor) -> Tensor:
            merge = vision.spatial_merge_size
            pixels = torch.zeros(merge**2, values, device=embeddings.device, dtype=owner.visual.dtype)
            grid = torch.tensor([[1, merge, merge]], device=embeddings.device)
            seen = owner.get_image_features(pixels, grid, return_dict=True)
            parts = [*seen.pooler_output, *(level[0] for level in getattr(seen, "deepstack_features", None) or ())]
            return sum(part.sum() * 0.0 for part in parts)

        with embeddings_plus(model, nothing):
            yield

    def connect(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> None:
        """The mergers on records that are pictures all over, since a picture may take any number of tokens."""
        vision, visual = self.config.vision_config, unwrapped(model).model.visual
        patches = records * tokens * vision.spatial_merge_size**2
        for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
            merger(torch.empty(patches, vision.hidden_size, dtype=dtype, device="meta").float())

    def language(self, model: nn.Module) -> nn.Module:
        """The Qwen."""
        return unwrapped(model).model.language_model

    @property
    def silent(self) -> list[int]:
        """None: in the stock loss all rows take part, the placeholder's and those beyond the vocabulary."""
        return []

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor) -> Any:
        """Of three axes: time, row and column."""
        return self.language(model).rotary_emb(hidden, positions.expand(3, -1, -1))


class Qwen25VL(QwenVL):
    """Qwen2_5_VLForConditionalGeneration."""

    model_class = Qwen2_5_VLForConditionalGeneration
    config_class = Qwen2_5_VLConfig
    template = CHATML

    @property
    def boxes(self) -> str:
        """Pixels of the picture as the model sees it, which its bounds decide on."""
        size = self.processor.image_processor.size
        bounds = f"{size['shortest_edge']} to {size['longest_edge']}"
        return f"qwen2_5_vl: pixels of pictures resized to {bounds} pixels in squares of {self._side}"

    def box_frame(self, width: int, height: int) -> tuple[int, int]:
        """The resized picture's width and height. Raises ValueError as `resized` does."""
        return self.resized(width, height)


class Qwen3VL(QwenVL):
    """Qwen3VLForConditionalGeneration: no system prompt of its own, and mergers of three levels of the tower besides
    the last, which reach the first blocks of the language model."""

    model_class = Qwen3VLForConditionalGeneration
    config_class = Qwen3VLConfig
    template = replace(CHATML, system="")

    def __init__(self, config: Qwen3VLConfig, processor: Processor | None, options: BaseOptions = AS_IS):
        super().__init__(config, processor, options)
        levels = range(len(config.vision_config.deepstack_visual_indexes))
        self.connector += tuple(f"deepstack_merger_list.{level}" for level in levels if self.connector)

    @property
    def boxes(self) -> str:
        """Thousandths of the picture's sides."""
        return "qwen3_vl: thousandths of the sides"

    def box_frame(self, width: int, height: int) -> tuple[int, int]:
        """Whatever its size."""
        return 1000, 1000


def read_parts(path: Path, pictures: type) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return the tokenizer of a folder and its image processor, of the class `pictures`. Raises FileNotFoundError or
    ValueError naming the file or folder."""
    check_tokenizer(path)
    if not (path / "preprocessor_config.json").is_file():
        check_file(path / "processor_config.json")
    try:
        return AutoTokenizer.from_pretrained(path), pictures.from_pretrained(path)
    except Exception as error:  # of many classes, none of which names the folder
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: the tokenizer or image processor there cannot be read ({reason})") from error


def check_words(path: Path, tokenizer: PreTrainedTokenizerBase, picture: str, config: PreTrainedConfig) -> None:
    """Raise ValueError naming the folder unless the tokenizer knows the word for a picture as the model does, and as
    `check_vocabulary` does."""
    if tokenizer.convert_tokens_to_ids(picture) != config.image_token_id:
        raise ValueError(f"{path}: the tokenizer's {picture} is not token {config.image_token_id}, as config.json says")
    check_vocabulary(path, tokenizer, config.text_config.vocab_size)


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise ValueError naming the folder unless a Qwen's tokenizer fits a head of so many rows and ends turns."""
    if len(tokenizer) > rows:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} words, the model {rows}: they are of two checkpoints; copy "
            "the model's own tokenizer there"
        )
    if tokenizer.eos_token != CHATML.end:
        raise ValueError(
            f"{path}: turns end in {CHATML.end} but the tokenizer's end of text is {tokenizer.eos_token!r}; take an "
            "Instruct checkpoint"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(f"{path}: the tokenizer needs a pad token of its own; set pad_token in its config")
