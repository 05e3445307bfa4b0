"""Two small models: a random one shaped like the shipped base (48-pixel pictures, 36 image tokens), and the original
code's, assembled from its parts, with the numbers that code gave for it."""

import gc
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from data.records import load_samples
from llava.backbones import load_base
from llava.backbones.llava15 import SYSTEM, Llava15
from llava.original.base import assemble

ORIGINAL = Path(__file__).parent / "golden" / "llava_original"

CORPUS = [
    SYSTEM + " USER: ASSISTANT:",
    "What is the animal in the picture? Answer the question using a single word or phrase.",
    "Is the red bird left of the house? yes no dog cat tree blue 0 1 2 3 4 5 6 7 8 9 [0.12, 0.34] A. B. C. D.",
]


def make_tokenizer() -> LlamaTokenizer:
    """A Llama tokenizer with bytes to fall back on and `<image>` as an added special token."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    draft = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    draft.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=pieces, show_progress=False))
    model = json.loads(draft.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], legacy=True)
    tokenizer.add_special_tokens({"pad_token": "<unk>", "additional_special_tokens": ["<image>"]})
    return tokenizer


def make_base(
    folder: Path, vision_feature_layer: int | list[int] = -1, width: int = 32, padding: int = 0, layers: int = 2
) -> Path:
    """Save a random model and its processor to `folder`, as `save_pretrained` does."""
    tokenizer = make_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=8,
        initializer_factor=2.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
        vision_feature_layer=vision_feature_layer,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A folder with a random base model whose features are those of the vision tower's last layer."""
    return make_base(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture
def tiny(tiny_base):
    """A fresh copy of that model and its backbone."""
    return load_base(tiny_base)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with ten pictures, not all square, and train.json: records with and without one, one of two turns."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(10):
        size = (48, 30 + 4 * number)
        Image.new("RGB", size, (20 * number, 255 - 20 * number, 128)).save(folder / f"{number}.png")
        turns = [
            ("human", "<image>\nWhat is the animal?\nAnswer the question using a single word or phrase."),
            ("gpt", "dog"),
        ]
        if number == 3:
            turns += [("human", "What color is it?"), ("gpt", "red")]
        records.append(
            {
                "id": f"p{number}",
                "image": f"{number}.png",
                "conversations": [{"from": role, "value": value} for role, value in turns],
            }
        )
    for number in range(6):
        question = "Which is it? " + "really " * number
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ABC"[number % 3]}]
        records.append({"id": f"t{number}", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def assemble_original():
    """A fresh model and processor from the three parts of the original layout."""
    return assemble(ORIGINAL / "vicuna-tiny", ORIGINAL / "clip-tiny-patch14-42", ORIGINAL / "mm_projector.bin")


@pytest.fixture(scope="session")
def original() -> SimpleNamespace:
    """The original code's model (not to be changed), its four samples and what it made of them."""
    model, processor = assemble_original()
    return SimpleNamespace(
        folder=ORIGINAL,
        model=model.eval(),
        processor=processor,
        backbone=Llava15(model.config, processor),
        samples=load_samples(ORIGINAL / "train.json", ORIGINAL),
        expected=json.loads((ORIGINAL / "expected.json").read_text()),
        tensors=load_file(ORIGINAL / "expected.safetensors"),
    )


def pytest_collection_modifyitems(items):
    """Files with many long tests come first: a file goes to one worker, and none should be left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish():
    """What all imports left is out of the garbage collector's sight: accelerate has it look at every stage's end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is kept between starts goes into a folder of this test process, which no other run has seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLACA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
