"""A LLaVA whose language model is asked in ChatML and pads with its end of text, against stock transformers."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_llava_vl import pictures, samples_of  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava.adapters import attach_lora, save_adapter, trainable_parameters
from llava.backbones import family_of, load_base, open_backbone
from llava.backbones.llava15 import Llava15, LlavaChat
from llava.dataset import Collator, InstructionDataset
from llava.generate import generate_answers
from llava.greedy import Decoder

SIDE, PATCH = 16, 8
SYSTEM = "<|im_start|>system\nAnswer well.<|im_end|>\n"
CHAT_TEMPLATE = """{{- '<|im_start|>system\nAnswer well.<|im_end|>\n' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for item in message['content'] -%}
{{- '<image>\n' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges; as SmolLM2's it begins texts with nothing, and pads with what ends them."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer, draft.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    draft.train_from_iterator(["What is the animal in the picture? A dog, a cat."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=draft,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def make_chat(folder: Path, width: int = 32) -> Path:
    """Save a random model of three layers with a tied head; a picture takes four tokens."""
    tokenizer = chat_tokenizer()
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=SIDE, patch_size=PATCH)  # fmt: skip
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                       num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    images = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIDE}, crop_size=size, do_center_crop=True)
    LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_chat(tmp_path_factory.mktemp("chat"))


def stock_inputs(folder: Path, turns, path: Path | None, asks: bool) -> dict:
    """What the stock processor makes of a conversation by the folder's chat template."""
    processor, messages = LlavaProcessor.from_pretrained(folder, backend="pil"), []
    for number, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] if path and not number else []
        question = question.removeprefix("<image>\n")
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if not asks:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=asks)
    images = [Image.open(path).convert("RGB")] if path else None
    return processor(text=[text], images=images, return_tensors="pt")


def test_the_folder_says_how_it_is_asked(base, tiny_base, tmp_path):
    assert family_of(base) is LlavaChat and family_of(tiny_base) is Llava15
    assert open_backbone(base).template.prompt("<image>\nWhat?") == (
        f"{SYSTEM}<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    other = make_chat(tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for message in messages %}Q: {{ message['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=rf"{other}: its chat template asks .* which is not ChatML"):
        open_backbone(other)


def test_tokens_logits_and_loss_are_stock_transformers(base, pictures):  # noqa: F811
    """Each record alone, then all in one batch, whose padding is the token that ends every answer."""
    model, backbone = load_base(base)
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id
    samples, total, words = samples_of(pictures), 0.0, 0
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    batch = Collator(backbone)(list(dataset))
    assert len({len(item["input_ids"]) for item in dataset}) > 3
    with torch.no_grad():
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    for row, sample in enumerate(samples):
        stock = stock_inputs(base, sample.turns, sample.image, asks=False)
        item, count = dataset[row], len(dataset[row]["input_ids"])
        assert stock["input_ids"][0].tolist()[:count] == item["input_ids"].tolist()
        assert backbone.tokenizer.decode(stock["input_ids"][0, count:]) == "\n", "behind the last answer"
        supervised = item["input_ids"][item["labels"] != -100].tolist()
        said = "".join(f"{answer}<|im_end|>" for _, answer in sample.turns)
        assert backbone.tokenizer.decode(supervised) == said
        with torch.no_grad():
            logits = model(**stock).logits[0, :count]
        torch.testing.assert_close(together[row, :count], logits, atol=2e-5, rtol=2e-5)
        logits[:, backbone.placeholder] = -torch.inf  # no word: it takes no part in the loss
        total += torch.nn.functional.cross_entropy(logits[:-1], item["labels"][1:], reduction="sum").item()
        words += len(supervised)
    with torch.no_grad():
        assert backbone.answer_loss(model, batch).item() == pytest.approx(total, rel=1e-5) and words > 20


def test_greedy_answers_are_stock_generates(base, pictures):  # noqa: F811
    model, backbone = load_base(base)
    asked = [(f"Which{' one' * number}?", path) for path in [*pictures, None] for number in range(3)]
    wanted = []
    for question, path in asked:
        stock = stock_inputs(base, [(question, "")], path, asks=True)
        output = model.generate(**stock, do_sample=False, max_new_tokens=6, suppress_tokens=[backbone.placeholder])
        wanted.append(backbone.tokenizer.decode(output[0, stock["input_ids"].shape[1] :], skip_special_tokens=True))
    prompts = [f"<image>\n{question}" if path else question for question, path in asked]
    assert len(set(wanted)) > 5
    for size in (1, 4, 18):
        said = generate_answers(Decoder(model, backbone, 6), prompts, [path for _, path in asked], size)
        assert said == [text.strip() for text in wanted], size


def test_an_adapter_opens_with_stock_peft_and_merges_beside_a_tied_head(base, pictures, tmp_path):  # noqa: F811
    model, backbone = load_base(base)
    head = model.lm_head.weight.detach().clone()
    torch.manual_seed(1)
    model = attach_lora(model, backbone, 4, 8, 0.0).eval()
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    save_adapter(model, tmp_path / "adapter")
    backbone.merge(base, tmp_path / "adapter", tmp_path / "merged", None)
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures), backbone, 512)))
    batch.pop("labels")
    stock = PeftModel.from_pretrained(load_base(base)[0], tmp_path / "adapter").eval()
    merged, reader = load_base(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight and torch.equal(merged.lm_head.weight, head)
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(stock(**batch).logits, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(merged(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    assert reader.template == backbone.template
    asked, images = ["<image>\nWhat?", "Who?"], [pictures[0], None]
    answers = generate_answers(Decoder(model, backbone, 6), asked, images)
    assert generate_answers(Decoder(merged, reader, 6), asked, images) == answers
    get_peft_model(load_base(base)[0], LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"shares with its embedding: .*lm_head"):
        backbone.merge(base, tmp_path / "head", tmp_path / "never", None)


def test_nf4_keeps_tower_projector_and_tied_head(tmp_path, pictures):  # noqa: F811
    folder = make_chat(tmp_path / "wide", width=64)
    model, backbone = load_base(folder, quantization="nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    assert {name for name, kind in kinds.items() if kind == "Linear4bit"} == {
        n for n in kinds if "layers" in n and "language" in n
    }
    model = attach_lora(model, backbone, 4, 8, 0.0)
    batch = Collator(backbone)(list(InstructionDataset.of_samples(samples_of(pictures), backbone, 512)))
    backbone.answer_loss(model, batch).backward()
    assert all(weight.grad is not None for weight in trainable_parameters(model).values())


def test_a_broken_tokenizer_config_is_named(base, tmp_path):
    folder = make_chat(tmp_path / "broken")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"pad_token": None}))
    with pytest.raises(ValueError, match=f"{folder}: the tokenizer needs a pad token"):
        open_backbone(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        family_of(folder)
