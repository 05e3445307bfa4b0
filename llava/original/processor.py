"""The processor that is written beside a model: the stock classes see the very tokens that training saw.

Training tokenises the text on either side of the picture by itself (`llava.conversation`); the stock LlavaProcessor
tokenises the whole prompt with `<image>` repeated in it. With most tokenizers that is the same. Those of Llama with
`legacy: false` put a word boundary before the beginning of a text alone, and training therefore has one behind the
picture where the stock class has none. What is written makes the difference up. Our own tokens stay what they are.
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

from llava.backbones.llava15 import PLACEHOLDER, SYSTEM, VICUNA
from llava.conversation import Vocabulary, encode_prompt

# The vicuna_v1 prompt of llava/backbones/llava15.py, for apply_chat_template. A turn is text, or a list of text and
# image items; the texts of a turn are one text. A system message takes the place of the usual first sentence.
CHAT_TEMPLATE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
    {{- SYSTEM + ' ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set turn = namespace(text='', images=0) -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {%- set turn.text = turn.text + item['text'] -%}
            {%- elif item['type'] in ('image', 'image_url') -%}
                {%- set turn.images = turn.images + 1 -%}
            {%- else -%}
                {{- raise_exception('This model reads text and images, not ' + item['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if turn.images > (1 if message['role'] == 'user' else 0) -%}
        {{- raise_exception('A question of the user shows at most one image, other turns none') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if turn.images or IMAGE in turn.text -%}
            {%- set turn.text = (IMAGE + '\\n' + turn.text.replace(IMAGE, '').strip()).strip() -%}
        {%- endif -%}
        {{- 'USER: ' + turn.text -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ASSISTANT: ' + turn.text + '</s>' -}}
    {%- elif message['role'] == 'system' and loop.first -%}
        {{- turn.text + ' ' -}}
    {%- else -%}
        {{- raise_exception('Turns are of user and assistant; a system message stands first') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ASSISTANT:' -}}
{%- endif -%}
""".replace("SYSTEM", json.dumps(SYSTEM)).replace("IMAGE", json.dumps(PLACEHOLDER))  # fmt: skip

PROBES = (f"{PLACEHOLDER}\nWhat is it?", PLACEHOLDER, f"{PLACEHOLDER}\n2 [0.12]", "What is it?")


def write_processor(processor: LlavaProcessor, config: LlavaConfig, out: Path) -> None:
    """Write a processor with CoIN's prompt as its chat template, in files and names that transformers 4.57 reads too.

    Raises ValueError if stock classes would still see other tokens than training does.
    """
    old, image = processor.tokenizer, processor.image_processor
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bounded(old.backend_tokenizer),
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        pad_token=old.pad_token,
        model_max_length=old.model_max_length,
        padding_side=old.padding_side,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    for question in PROBES:
        wanted, text = encode_prompt(Vocabulary.of(old, VICUNA), question, 2), VICUNA.prompt(question)
        if wanted != tokenizer(text.replace(PLACEHOLDER, 2 * PLACEHOLDER)).input_ids:
            raise ValueError(
                f"the tokenizer of {old.name_or_path} splits {question!r} otherwise with the rest of the prompt than "
                "by itself: LlavaProcessor would ask the model other tokens than it was trained on"
            )
    LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    _rewrite(out / "tokenizer_config.json", _settings(tokenizer))
    pictures = json.loads((out / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    _rewrite(out / "preprocessor_config.json", pictures | {"processor_class": "LlavaProcessor"})


def starts_words_once(tokenizer: dict) -> dict | None:
    """Return the Metaspace of a tokenizer.json that puts a word boundary before a text's beginning alone, if any."""
    step = tokenizer.get("pre_tokenizer") or {}
    for part in step.get("pretokenizers", [step]):
        if part.get("type") == "Metaspace" and part["prepend_scheme"] == "first":
            return part
    return None


def _bounded(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, which puts a word boundary behind the picture if it puts one before a text.

    `<image>` is looked for behind the normaliser, which sees what follows it: unless that is a space, a boundary, more
    of the picture, another special token or the end, it writes the boundary. A text without the picture stays as it is.
    """
    content = json.loads(backend.to_str())
    if (scheme := starts_words_once(content)) is None:
        return backend
    boundary = scheme["replacement"]
    [image] = [token for token in content["added_tokens"] if token["content"] == PLACEHOLDER]
    image["normalized"] = True
    seen = [re.escape(token["content"]) for token in content["added_tokens"] if token["normalized"]]
    pattern = {"Regex": rf"{PLACEHOLDER}(?!{'|'.join((' ', boundary, *seen))}|\z)"}
    step = {"type": "Replace", "pattern": pattern, "content": PLACEHOLDER + boundary}
    before = content["normalizer"]
    before = [] if before is None else before["normalizers"] if before["type"] == "Sequence" else [before]
    if step in before:
        return backend  # of a folder written here
    if before:
        step = {"type": "Sequence", "normalizers": [*before, step]}
    return Tokenizer.from_str(json.dumps(content | {"normalizer": step}))


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict:
    """tokenizer_config.json in the names of transformers 4; version 5 reads them, and takes tokenizer.json as it is."""
    tokens = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    return tokens | {
        "additional_special_tokens": [PLACEHOLDER],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _rewrite(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
