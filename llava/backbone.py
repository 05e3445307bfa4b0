"""A backbone: all that a family of base models has of its own. The rest of the code takes one and imports no family.

A family subclasses `Backbone` in one file of llava/backbones/, which also opens folders. Whatever is not overridden is
that of a causal language model without pictures.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from llava.conversation import IGNORE, Template, Vocabulary
from llava.features import FeatureCache

NO_REUSE = "reuse_vision_features: this base model cannot; leave it out"


@dataclass(frozen=True)
class BaseOptions:
    """What a recipe says of a base model beyond its folder. min_pixels, max_pixels: of a picture when the model sees
    it, where the family lets pictures differ in size; 0: what the folder says. train_connector: beside LoRA."""

    min_pixels: int = 0
    max_pixels: int = 0
    train_connector: bool = True


AS_IS = BaseOptions()


class Backbone(ABC):
    """One base model without its weights: configuration, tokenizer, and what becomes of pictures.

    model_class, config_class: transformers'. template: the words of its prompts. lora_targets: regular expression of
    the names of the linear layers that get LoRA. connector: names of the modules between pictures and language that
    train whole beside LoRA. unquantized: modules that a quantized base keeps as they are; quantizable: it may be one.
    generates: answers come from transformers' own `generate`, since questions cannot share a prefix.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    template: ClassVar[Template]
    lora_targets: ClassVar[str]
    connector: ClassVar[tuple[str, ...]] = ()
    unquantized: ClassVar[tuple[str, ...]] = ("lm_head",)
    quantizable: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    def __init__(self, config: PreTrainedConfig, processor: Any, options: BaseOptions = AS_IS):
        """`processor` is transformers': a processor with a tokenizer, or a tokenizer alone; None: only shapes are asked
        for. Raises ValueError for options that the family does not have."""
        self.config, self.processor = config, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not options.train_connector:
            self.connector = ()
        self.bound_pixels(options.min_pixels, options.max_pixels)

    @classmethod
    def variant(cls, path: Path) -> type["Backbone"]:
        """Return the family itself, or the one of its kinds that a folder holds, where its tokenizer tells."""
        return cls

    @classmethod
    @abstractmethod
    def read_processor(cls, path: Path, config: PreTrainedConfig) -> Any:
        """Return the processor of a folder. Raises FileNotFoundError or ValueError naming the file that is missing or
        broken, or unless it fits `config`."""

    @classmethod
    def check_sharding(cls, path: Path) -> None:
        """Raise ValueError for a folder whose weights cannot be loaded in shards (ZeRO 3)."""
        return None

    @classmethod
    def merge(cls, base: Path, adapter: Path, out: Path, dtype: torch.dtype | None) -> None:
        """Write `base` with `adapter` added to its weights, as `llava.merge.merge_folder` does."""
        from llava.merge import merge_folder

        merge_folder(base, adapter, out, dtype)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The encoder of its texts."""
        return Vocabulary.of(self.tokenizer, self.template)

    @property
    def placeholder(self) -> int | None:
        """The id of the token that stands for a picture's positions, None where it takes no pictures."""
        return self.vocabulary.image

    @property
    def digest(self) -> str:
        """What tells backbones apart that make other tokens of a record."""
        pictures = getattr(self.processor, "image_processor", None)
        content = f"{self.vocabulary.digest} {self.config.to_json_string()} {pictures and pictures.to_json_string()}"
        return hashlib.sha256(content.encode()).hexdigest()

    # --- pictures ---

    def bound_pixels(self, least: int, most: int) -> None:
        """Have pictures take so many pixels at least and at most; 0: as it is. Raises ValueError where they cannot."""
        if least or most:
            raise ValueError("min_pixels, max_pixels: this base model's pictures have one size; leave them out")

    def picture_tokens(self, root: Path, names: Sequence[str]) -> np.ndarray:
        """Return how many positions each of these pictures below `root` takes: int32 [len(names)].

        A picture that cannot be opened counts 1 and raises nothing: the check of the records tells what is wrong.
        """
        return np.zeros(len(names), np.int32)

    def picture_faults(self, root: Path, names: Sequence[str]) -> dict[int, str]:
        """Return what is wrong with those of the pictures that can be opened and that the model cannot take, by their
        place in `names`."""
        return {}

    def picture(self, path: Path) -> dict[str, Tensor]:
        """Return what the model takes of one picture, by the names of its arguments. Raises OSError for a picture that
        cannot be opened."""
        raise ValueError(f"{path}: this base model takes no pictures")

    def stack(self, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what the model takes of several pictures, of results of `picture`."""
        return {key: torch.stack([picture[key] for picture in pictures]) for key in pictures[0]}

    def tokens_of(self, picture: Mapping[str, Tensor]) -> int | None:
        """Return how many tokens a result of `picture` takes, None where all take the same."""
        return None

    def beside_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what the model takes beside token ids [rows, tokens] that show pictures, and beside the pictures."""
        return {}

    def positions_saved(self, pictures: Mapping[str, Tensor]) -> Tensor | int:
        """Return by how many positions the text behind each of these pictures, results of `stack`, stands nearer than
        their numbers of tokens say: int64 [pictures], or 0 for all."""
        return 0

    @property
    def boxes(self) -> str | None:
        """The coordinates of boxes that the base model was trained on, where they are not fractions; None else."""
        return None

    def box_frame(self, width: int, height: int) -> tuple[int, int]:
        """Return the largest x and y in these coordinates in a picture of so many pixels."""
        raise ValueError("this base model has no coordinates of its own")

    @contextmanager
    def without_picture(self, model: nn.Module) -> Iterator[None]:
        """Lets a batch without pictures reach every trained tensor meanwhile, and changes nothing else."""
        yield

    def vision(self, model: nn.Module) -> nn.Module:
        """Return the frozen part of the model that sees. This and the next two: raise ValueError where features of
        pictures cannot be reused."""
        raise ValueError(NO_REUSE)

    def vision_features(self, model: nn.Module, lists: Sequence[Sequence[Path]]) -> FeatureCache:
        """Return what the vision part makes of lists of pictures, computed or read from the cache."""
        raise ValueError(NO_REUSE)

    def use_features(self, model: nn.Module, features: FeatureCache) -> None:
        """Have `picture` give features, and `model`, in place, take them."""
        raise ValueError(NO_REUSE)

    def connect(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> None:
        """Run the connector of a `model` on the meta device on the pictures of so many records of at most so many
        tokens, for llaca.plan; here there is none."""
        return None

    # --- text ---

    @abstractmethod
    def language(self, model: nn.Module) -> nn.Module:
        """Return the language model's stack, with `layers` and `rotary_emb`."""

    def run_layer(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """Run a layer of a `model` on the meta device on so many records of so many tokens, for llaca.plan. Return how
        many layers there are, and what went in [records, tokens, width]."""
        text = self.language(model)
        hidden = torch.empty(records, tokens, text.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        positions = torch.arange(tokens, device="meta")[None]
        rotary = self.rotary(model, hidden, positions)
        text.layers[0](hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return len(text.layers), hidden

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor) -> Any:
        """Return what a layer of the stack takes as `position_embeddings` of running positions [1, tokens]."""
        return self.language(model).rotary_emb(hidden, positions)

    @property
    def silent(self) -> list[int]:
        """Rows of the head that are no words: they stay out of the loss and out of answers."""
        return [] if self.placeholder is None else [self.placeholder]

    def answer_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[ModelOutput, Tensor]:
        """Run a collated batch; return outputs whose `logits` [tokens, words] are those of the supervised tokens alone,
        and these tokens [tokens]."""
        inputs = dict(batch)
        targets = functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE)
        supervised = targets != IGNORE
        return model(**inputs, logits_to_keep=supervised, use_cache=False), targets[supervised]

    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of logits [tokens, words], in float32, without what is `silent`: as in the
        original LLaVA, whose vocabulary does not have the picture's placeholder."""
        logits = logits.float()
        if self.silent:
            columns = torch.tensor(self.silent, dtype=torch.long, device=logits.device)
            logits = logits.index_fill(1, columns, -torch.inf)
        return functional.cross_entropy(logits, targets, reduction="sum")

    def answer_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return -log p of a collated batch's answers: the summed cross entropy of its supervised tokens."""
        outputs, targets = self.answer_logits(model, batch)
        return self.token_loss(outputs.logits, targets)


@contextmanager
def embeddings_plus(model: nn.Module, what: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Adds what is made of the token embeddings, a number, to them meanwhile."""
    hook = model.get_input_embeddings().register_forward_hook(
        lambda embeddings, inputs, output: output + what(output).to(output.dtype)
    )
    try:
        yield
    finally:
        hook.remove()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return transformers' model, below PEFT's wrapping if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
