"""The tiny base models of CoIN-mini, a class a family: tokenizer, processor, random weights, what is asked of patches.

All see the same pictures, 48 pixels along the longer side, and cut them into squares of 8 pixels, a token each; in a
world of twice the size (data/mini/world.py) both are.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.mini import corpus
from data.mini.tasks import TASKS
from data.mini.world import MINI, SIDE, Scene, draw
from llava.backbones.llava15 import PLACEHOLDER, SYSTEM, VICUNA
from llava.backbones.qwen_vl import Qwen3VL, Qwen25VL
from scripts.tiny_targets import PATCH, patch_targets


@dataclass(frozen=True)
class Phase:
    """A part of pre-training: `steps` unless the family has others, `batch` samples a process and step; `side` weighs
    the patch loss; `text_share` of the samples have no picture; `echo`: half of these are words to repeat."""

    steps: int
    lr: float
    batch: int
    vision_lr: float = 0.0
    side: float = 0.0
    text_share: float = 0.0
    echo: bool = False


# What every language model of them has in common.
TEXT = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 5, "num_attention_heads": 5,
        "num_key_value_heads": 5, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
# What the Qwen towers have in common: a token is 2 x 2 patches of 4 pixels.
QWEN_VISION = {"depth": 3, "hidden_size": 80, "intermediate_size": 240, "num_heads": 4, "patch_size": 4,
               "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": TEXT["hidden_size"]}  # fmt: skip
QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def learn_pieces(instructions: Path, more: Sequence[str], samples: int = 20_000) -> tuple[dict[str, int], list]:
    """Return vocabulary and merges of a BPE with byte fallback. Every word of the world, of the questions and of the
    instructions is one piece, and of the texts `more`; a number or an option letter is one piece whatever precedes
    it."""
    rng, texts = random.Random(0), []
    for _ in range(samples):
        texts += [text for turn in corpus.conversation(rng, 9)[1] + corpus.text_only(rng) for text in turn]
    for task in TASKS.values():
        texts += [text for _ in range(samples // 10) for turn in task(MINI, rng).turns for text in turn]
    words = json.loads(instructions.read_text())["instructions"]
    texts += [text for sets in words.values() for lines in sets.values() for text in lines] * 50
    texts = [f"{text}\n{text}" for text in texts] + [*more] * 50
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"\d\.\d\d|[.,:;?!()\[\]\n]|\d|▁(?=\d|[A-E]\b)|\b[A-E]\b"), "isolated"),
        ]
    )
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, min_frequency=10, show_progress=False))
    state = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [p for p in sorted(state["vocab"], key=state["vocab"].get) if p not in pieces]
    return {piece: i for i, piece in enumerate(pieces)}, [tuple(merge) for merge in state["merges"]]


class TinyLlava:
    """A LLaVA-1.5 of 2.9 M parameters: pictures are padded to a square, 36 tokens each."""

    template = VICUNA
    world = MINI
    width = 128  # of what the probe reads
    frozen: ClassVar[tuple[str, ...]] = ()  # what of the module no phase trains

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, instructions: Path) -> None:
        """Write tokenizer and processor. The system prompt is one piece, so that a picture and a question are some 70
        tokens."""
        vocabulary, merges = learn_pieces(instructions, ["USER: \nUSER: ASSISTANT: "])
        tokenizer = LlamaTokenizer(
            vocab=vocabulary,
            merges=merges,
            pad_token="<unk>",
            model_max_length=512,
            padding_side="right",
            add_bos_token=True,
            extra_special_tokens={"image_token": PLACEHOLDER},
        )
        tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
        self.write_processor(tokenizer)

    def write_processor(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write a tokenizer with what makes pictures of the world's size into as many tokens as they have squares."""
        side = self.world.side
        images = LlavaImageProcessorPil(
            do_pad=True,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_center_crop=True,
        )
        LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH * self.world.unit,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(self.folder)

    def read(self) -> None:
        """Read what `write` wrote."""
        processor = LlavaProcessor.from_pretrained(self.folder, backend="pil")
        self.tokenizer = processor.tokenizer
        mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
        self.fill = tuple(int(255 * m) for m in mean)  # of what pads a picture
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def model(self) -> LlavaForConditionalGeneration:
        """One with random weights."""
        tokenizer = self.tokenizer
        vision = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=128,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **TEXT,
        )
        return self.prepared(LlavaForConditionalGeneration(self.joined(tokenizer, vision, text)))

    def joined(self, tokenizer: PreTrainedTokenizerFast, vision: CLIPVisionConfig, text: LlamaConfig) -> LlavaConfig:
        """The configuration of a tower before a language model: the last layer's patches, a token each."""
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=text.tie_word_embeddings,
        )

    def load(self, folder: Path) -> LlavaForConditionalGeneration:
        """A trained one."""
        return self.prepared(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))

    @staticmethod
    def finished(model: PreTrainedModel) -> PreTrainedModel:
        """The same, to save."""
        return model.half()

    @staticmethod
    def prepared(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
        """The same, to train."""
        model.set_attn_implementation("eager")
        model.model.vision_tower.post_layernorm.requires_grad_(False)  # not on the path to the patch features
        return model

    def tokens(self, scene: Scene) -> int:
        """How many the picture takes."""
        return (SIDE // PATCH) ** 2

    def targets(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """`patch_targets` of all their squares."""
        side = self.world.side
        return torch.cat([patch_targets(scene, (0, 0, side, side)) for scene in scenes])

    def pictures(self, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
        """What the processor gives: pictures are as long as the tower takes them, so they are padded and normalised."""
        side = self.world.side
        canvas = torch.empty(len(scenes), side, side, 3, dtype=torch.uint8)
        canvas[:] = torch.tensor(self.fill, dtype=torch.uint8)
        for row, scene in zip(canvas, scenes, strict=True):
            width, height = scene.size
            picture = torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8).view(height, width, 3)
            x, y = (side - width) // 2, (side - height) // 2
            row[y : y + height, x : x + width] = picture
        return {"pixel_values": (canvas.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std}

    def beside_ids(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes beside them."""
        return {}

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The part that sees."""
        return model.model.vision_tower

    def look(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
        """Run that part alone."""
        self.tower(model)(inputs["pixel_values"], output_hidden_states=True)

    def features(self, output) -> torch.Tensor:
        """[squares of all pictures, width] of its output."""
        return output.hidden_states[-1][:, 1:].flatten(0, 1)


class TinyQwen25:
    """A Qwen2.5-VL of 2.4 M parameters: pictures keep their size, a token is 2 x 2 patches of 4 pixels."""

    family = Qwen25VL
    template = Qwen25VL.template
    world = MINI
    width = TEXT["hidden_size"]
    frozen: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar = {"vision": 3000, "whole": 3000, "finish": 1000}  # an hour, like LLaVA's more

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, instructions: Path) -> None:
        """Write tokenizer and image processor. The system prompt is one piece."""
        vocabulary, merges = learn_pieces(instructions, ["user\n assistant\n"])
        llama = LlamaTokenizer(vocab=vocabulary, merges=merges)
        backend = Tokenizer.from_str(llama.backend_tokenizer.to_str())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.post_processor = processors.TemplateProcessing("$A", "$A $B", [])  # no token before a text
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=list(QWEN_TOKENS),
            model_max_length=512,
            padding_side="right",
        )
        if self.template.system:
            said = self.template.system.removeprefix("<|im_start|>").partition("<|im_end|>")[0]
            tokenizer.add_tokens([AddedToken(said, normalized=False)])
        tokenizer.save_pretrained(self.folder)
        size = {"shortest_edge": PATCH * PATCH, "longest_edge": SIDE * SIDE}
        Qwen2VLImageProcessorPil(
            patch_size=QWEN_VISION["patch_size"],
            merge_size=QWEN_VISION["spatial_merge_size"],
            temporal_patch_size=QWEN_VISION["temporal_patch_size"],
            size=size,
        ).save_pretrained(self.folder)

    def read(self) -> None:
        """Read what `write` wrote."""
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(self.folder)

    def model(self) -> PreTrainedModel:
        """One with random weights."""
        model = self.family.model_class(self.config())
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.set_attn_implementation("eager")  # faster than sdpa at this size on a CPU
        return model

    def config(self) -> Qwen2_5_VLConfig:
        """All layers of the tower see the whole picture."""
        layers = list(range(QWEN_VISION["depth"]))
        vision = QWEN_VISION | {"window_size": 2 * SIDE, "fullatt_block_indexes": layers}
        return Qwen2_5_VLConfig(text_config=self.text(), vision_config=vision, **self.ids())

    def text(self) -> dict:
        """The language model's settings; positions turn 16 pairs of a head's 32 numbers."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        return TEXT | {
            "vocab_size": len(self.tokenizer),
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def ids(self) -> dict[str, int]:
        """The special tokens, as the configuration names them."""
        names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
                 "vision_end": "<|vision_end|>"}  # fmt: skip
        return {f"{name}_token_id": self.tokenizer.convert_tokens_to_ids(word) for name, word in names.items()}

    def load(self, folder: Path) -> PreTrainedModel:
        """A trained one."""
        return self.family.model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    @staticmethod
    def finished(model: PreTrainedModel) -> PreTrainedModel:
        """The same, to save."""
        return model.half()

    def tokens(self, scene: Scene) -> int:
        """How many the picture takes."""
        return scene.size[0] * scene.size[1] // PATCH**2

    def targets(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """`patch_targets` of all their squares."""
        found = []
        for scene in scenes:
            x, y = (SIDE - scene.size[0]) // 2, (SIDE - scene.size[1]) // 2
            found.append(patch_targets(scene, (x, y, x + scene.size[0], y + scene.size[1])))
        return torch.cat(found)

    def pictures(self, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
        """What the processor gives: sides are multiples of 8 already, so nothing is resized."""
        return dict(self.images([draw(scene) for scene in scenes], do_resize=False, return_tensors="pt"))

    def beside_ids(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes beside them."""
        return {"mm_token_type_ids": (ids == self.ids()["image_token_id"]).long()}

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The part that sees, with what merges patches."""
        return model.model.visual

    def look(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
        """Run that part alone."""
        self.tower(model)(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)

    def features(self, output) -> torch.Tensor:
        """[squares of all pictures, width] of its output."""
        return output.pooler_output


class TinyQwen3(TinyQwen25):
    """A Qwen3-VL of 2.5 M parameters, with one more merger, of the tower's second layer."""

    family = Qwen3VL
    template = Qwen3VL.template

    def config(self) -> Qwen3VLConfig:
        """Learned positions of the patches' grid, beside rotary ones."""
        grid = (SIDE // QWEN_VISION["patch_size"]) ** 2
        vision = QWEN_VISION | {"num_position_embeddings": grid, "deepstack_visual_indexes": [1]}
        text = self.text()
        text |= {"head_dim": 32, "rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True}}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **self.ids())

    def features(self, output) -> torch.Tensor:
        """The sum of all that reaches the language model."""
        return output.pooler_output + sum(output.deepstack_features)


FAMILIES = {"llava": TinyLlava, "qwen2_5_vl": TinyQwen25, "qwen3_vl": TinyQwen3}
