"""LLaVA-1.5 (arXiv 2310.03744): CLIP's patches, a projector of two layers, and a Llama that answers as vicuna_v1, or
in ChatML where its tokenizer ends texts with that word.

What trains is LoRA on every linear layer of the language model's blocks plus the whole projector. Every picture takes
the same number of positions.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessorPil, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.pictures import load_image
from data.progress import progress
from llava.backbone import AS_IS, Backbone, BaseOptions, embeddings_plus, unwrapped
from llava.backbones.chatml import CHATML, own_words
from llava.conversation import Template
from llava.features import FeatureCache, stored_features
from llava.files import check_file, check_tokenizer, read_object

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PLACEHOLDER = "<image>"
VICUNA = Template(f"{SYSTEM} ", "USER: ", " ASSISTANT:", " ", "</s>", PLACEHOLDER)
CHAT = replace(CHATML, system="", placeholder=PLACEHOLDER, before="", after="\n")
FEATURES_VERSION = 1  # of the cached files' content
AT_ONCE = 64  # pictures that the tower sees at once while features are computed


class Llava15(Backbone):
    """LlavaForConditionalGeneration and its LlavaProcessor. Pictures are padded to squares."""

    model_class = LlavaForConditionalGeneration
    config_class = LlavaConfig
    template = VICUNA
    lora_targets = r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    connector = ("linear_1", "linear_2")
    unquantized = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    features: FeatureCache | None = None

    @classmethod
    def variant(cls, path: Path) -> type["Llava15"]:
        """As `Backbone.variant`: LlavaChat where the tokenizer ends texts as ChatML does."""
        file = path / "tokenizer_config.json"
        end = read_object(file).get("eos_token") if file.is_file() else None
        return LlavaChat if (end.get("content") if isinstance(end, dict) else end) == CHAT.end else cls

    @classmethod
    def read_processor(cls, path: Path, config: LlavaConfig) -> LlavaProcessor:
        """As `Backbone.read_processor`."""
        check_tokenizer(path)
        if not (path / "processor_config.json").is_file():
            check_file(path / "preprocessor_config.json")  # of an older version, alone
        try:
            processor = LlavaProcessor.from_pretrained(path, backend="pil")
        except Exception as error:  # of many classes, none of which names the folder
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: LlavaProcessor cannot read the processor and tokenizer there ({reason})"
            ) from error
        processor.image_processor.do_pad = True
        _check_processor(path, config, processor, cls.template.end)
        return processor

    @classmethod
    def merge(cls, base: Path, adapter: Path, out: Path, dtype: torch.dtype | None) -> None:
        """As `Backbone.merge`, in files and names that older versions of transformers read, too."""
        from llava.original.adapter import merge

        merge(base, adapter, out, dtype)

    def picture_tokens(self, root: Path, names: Sequence[str]) -> np.ndarray:
        """The patches of the tower, and its class token where the configuration wants it."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return np.full(len(names), patches + (self.config.vision_feature_select_strategy == "full"), np.int32)

    def picture(self, path: Path) -> dict[str, torch.Tensor]:
        """`pixel_values`: [3, height, width] or, with features in use, [layers, tokens, width]."""
        if self.features is not None:
            return {"pixel_values": self.features(path)}
        return {"pixel_values": to_pixels(self.processor.image_processor, [load_image(path)])[0]}

    @contextmanager
    def without_picture(self, model: nn.Module) -> Iterator[None]:
        """Lets a batch without pictures go through vision tower and projector like others, and changes nothing.

        As in the original, which sends an empty picture along: the projector's gradient is zero rather than absent, so
        that the optimizer's moments keep decaying. And engines need it: where one rank has pictures and another has
        none, DDP waits for gradients that never come, and ZeRO, which reduces them in the order in which the backward
        pass makes them, adds up those of different tensors without a word. So it enters where pictures enter, at the
        embeddings.
        """
        owner = unwrapped(model).model

        def nothing(embeddings: torch.Tensor) -> torch.Tensor:
            return owner.get_image_features(pixel_values=_blank_pixels(owner)).pooler_output[0].sum() * 0.0

        with embeddings_plus(model, nothing):
            yield

    def vision(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return unwrapped(model).model.vision_tower

    def vision_features(self, model: nn.Module, lists: Sequence[Sequence[Path]]) -> FeatureCache:
        """The tower's hidden states [layers, tokens, width] of each picture, in the order of the configuration."""
        if isinstance(self.vision(model), CachedVisionTower):
            raise ValueError("the vision tower was already replaced; compute all features before using them")
        return stored_features(lists, self._tower_digest(model), partial(self.tower_states, model))

    @torch.no_grad()
    def tower_states(self, model: nn.Module, paths: Sequence[Path]) -> torch.Tensor:
        """Run the vision tower over pictures: [pictures, layers, tokens, width], on the CPU."""
        tower, rows = self.vision(model), []
        parameter = next(tower.parameters())
        for start in progress(range(0, len(paths), AT_ONCE), desc="vision features", leave=False, delay=3):
            images = [load_image(path) for path in paths[start : start + AT_ONCE]]
            pixels = to_pixels(self.processor.image_processor, images).to(parameter.device, parameter.dtype)
            states = tower(pixels, output_hidden_states=True).hidden_states
            rows.append(torch.stack([states[layer] for layer in _layers(self.config)], dim=1).cpu())
        return torch.cat(rows) if rows else torch.empty(0)

    def use_features(self, model: nn.Module, features: FeatureCache) -> None:
        """Put a `CachedVisionTower` in the tower's place: projector, language model, `forward` and `generate` are the
        stock ones and see the same numbers."""
        self.features = features
        unwrapped(model).model.vision_tower = CachedVisionTower(_layers(self.config))

    def connect(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> None:
        """The projector on as many patches as the language model sees."""
        patches, width = int(self.picture_tokens(Path(), [""])[0]), self.config.vision_config.hidden_size
        features = torch.empty(records, patches, width, dtype=dtype, device="meta")
        unwrapped(model).model.multi_modal_projector(features.float())

    def language(self, model: nn.Module) -> nn.Module:
        """The Llama."""
        return unwrapped(model).model.language_model

    def _tower_digest(self, model: nn.Module) -> str:
        """What tells vision towers apart: weights, settings, and what may round otherwise."""
        digest, tower = hashlib.sha256(), self.vision(model)
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        parameter = next(tower.parameters())
        device = torch.cuda.get_device_name() if parameter.is_cuda else torch.backends.cpu.get_cpu_capability()
        vision = self.config.vision_config  # whose JSON says nothing of the attention
        processor, layers = self.processor.image_processor.to_json_string(), _layers(self.config)
        settings = (vision.to_json_string(), tower.config._attn_implementation, processor, layers)
        digest.update(repr((FEATURES_VERSION, settings, device, torch.__version__, transformers.__version__)).encode())
        return digest.hexdigest()


class LlavaChat(Llava15):
    """The same model with a language model of another chat: asked as the folder's chat template says, which is ChatML.

    Padding may be the very token that ends an answer, as SmolLM2's: it is told by a row's length, never by its id.
    """

    template = CHAT

    def __init__(self, config: LlavaConfig, processor: LlavaProcessor | None, options: BaseOptions = AS_IS):
        super().__init__(config, processor, options)
        if processor is not None:
            self.template = own_words(self.tokenizer, CHAT)

    @classmethod
    def read_processor(cls, path: Path, config: LlavaConfig) -> LlavaProcessor:
        """As `Backbone.read_processor`. Raises ValueError as `own_words` does."""
        processor = super().read_processor(path, config)
        try:
            own_words(processor.tokenizer, CHAT)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return processor

    @classmethod
    def merge(cls, base: Path, adapter: Path, out: Path, dtype: torch.dtype | None) -> None:
        """As `Backbone.merge`: other versions of transformers do not matter here."""
        super(Llava15, cls).merge(base, adapter, out, dtype)


class CachedVisionTower(nn.Module):
    """Stands where the vision tower stood: hands cached hidden states `[pictures, layers, tokens, width]` through."""

    def __init__(self, layers: Sequence[int]):
        super().__init__()
        self.layers = list(layers)

    def forward(self, pixel_values: torch.Tensor, **_) -> BaseModelOutputWithPooling:
        """Return an output whose `hidden_states` holds the configured layers, under the configuration's own indices."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != len(self.layers):
            shape = list(pixel_values.shape)
            raise ValueError(f"cached features [pictures, {len(self.layers)}, tokens, width] expected, got {shape}")
        return BaseModelOutputWithPooling(hidden_states=dict(zip(self.layers, pixel_values.unbind(1), strict=True)))


def padding_processor(preprocessor: dict) -> LlavaImageProcessorPil:
    """Return LLaVA-1.5's image processor for the sizes, mean and deviation in a CLIP `preprocessor_config`: pictures
    are padded to squares in CLIP's mean colour, resized and normalised."""
    keys = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return LlavaImageProcessorPil(do_pad=True, **{key: preprocessor[key] for key in keys if key in preprocessor})


def to_pixels(image_processor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return `[len(images), 3, height, width]` normalised pixels, in float32, of RGB pictures of any size."""
    return image_processor(list(images), return_tensors="pt")["pixel_values"]


def _blank_pixels(owner: nn.Module) -> torch.Tensor:
    """One picture of zeros as the LlavaModel `owner` takes it: pixels, or cached features."""
    vision, weight = owner.config.vision_config, next(owner.multi_modal_projector.parameters())
    if isinstance(owner.vision_tower, CachedVisionTower):
        size = (1, len(owner.vision_tower.layers), 2, vision.hidden_size)  # the class token and one patch
    else:
        size = (1, 3, vision.image_size, vision.image_size)
    return torch.zeros(size, device=weight.device, dtype=owner.dtype)


def _layers(config: LlavaConfig) -> list[int]:
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def _check_processor(path: Path, config: LlavaConfig, processor: LlavaProcessor, end: str) -> None:
    tokenizer, rows = processor.tokenizer, config.text_config.vocab_size
    if tokenizer.convert_tokens_to_ids(PLACEHOLDER) != config.image_token_id:
        raise ValueError(
            f"{path}: {PLACEHOLDER} is not the tokenizer's token {config.image_token_id}, which config.json names"
        )
    if rows != len(tokenizer):
        raise ValueError(
            f"{path}: the model has {rows} words, the tokenizer {len(tokenizer)}; the rest would take part in every "
            f"loss. `python -m llava.checkpoint assemble --llm {path} --out DIR` takes it away"
        )
    if tokenizer.eos_token != end:
        raise ValueError(f"{path}: turns end in {end} but the tokenizer's end of text is {tokenizer.eos_token!r}")
    if tokenizer.pad_token_id in (None, config.image_token_id):
        raise ValueError(f"{path}: the tokenizer needs a pad token of its own; set pad_token in its config")
    size, crop = config.vision_config.image_size, processor.image_processor.crop_size
    if (crop["height"], crop["width"]) != (size, size):
        raise ValueError(f"{path}: the image processor makes {crop}, the vision tower takes {size} x {size} pixels")
