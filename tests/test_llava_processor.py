"""Folders written for others: the stock processor sees the tokens of training, and its chat template is our prompt."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
from conftest import ORIGINAL
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from data.records import IMAGE
from llava.backbones.llava15 import SYSTEM, VICUNA, Llava15
from llava.conversation import Vocabulary, encode, encode_prompt
from llava.original.base import config_of, read_base, write_base
from llava.original.names import load_tokenizer
from llava.original.processor import write_processor

SHIPPED = ORIGINAL.parents[2] / "checkpoints" / "tiny-llava"
LETTERS = (
    *("a", "Dog", "B.", " ", "  ", "\n", "\r\n", "\t", "0", "12", "[0.12, 0.30]", ".", ":", "é", "☃", "👩‍👧", "中文"),
    *("USER:", "ASSISTANT:", "<", ">", "image", "<imag", "<unk>", SYSTEM, "\u00a0", "▁"),
)  # fmt: skip
PICTURE = Image.new("RGB", (60, 40), (200, 30, 90))


@pytest.fixture(scope="module", params=["shipped", "stock legacy", "assembled legacy", "assembled modern"])
def written(request, tmp_path_factory, tiny_base):
    """A base's processor, the folder written of it and how many tokens its pictures take."""
    folder = tmp_path_factory.mktemp("written")
    if request.param.startswith("assembled"):
        llm = shutil.copytree(ORIGINAL / "vicuna-tiny", folder / "vicuna")
        settings = json.loads((llm / "tokenizer_config.json").read_text())
        settings["legacy"] = request.param.endswith("legacy")
        (llm / "tokenizer_config.json").write_text(json.dumps(settings))
        base = read_base(llm, ORIGINAL / "clip-tiny-patch14-42", ORIGINAL / "mm_projector.bin")
        write_base(base, folder / "out")
        config, processor = base.config, base.processor
    else:
        path = SHIPPED if request.param == "shipped" else tiny_base
        config = config_of(path)
        processor = Llava15.read_processor(path, config)
        processor.patch_size = None  # as in folders of older versions, where the pictures' settings stand alone
        write_processor(processor, config, folder / "out")
        shutil.copy(path / "config.json", folder / "out")
    return SimpleNamespace(
        base=processor,
        config=config,
        folder=folder / "out",
        stock=LlavaProcessor.from_pretrained(folder / "out"),
        ours=Llava15.read_processor(folder / "out", config),
        count=int(Llava15(config, processor).picture_tokens(folder, ["a"])[0]),
    )


def vocabulary_of(processor):
    return Vocabulary.of(processor.tokenizer, VICUNA)


def drawn(rng, longest, *more):
    return "".join(rng.choice((*LETTERS, *more)) for _ in range(rng.randint(0, longest)))


def test_stock_asks_the_tokens_of_training(written):
    """Questions with the picture anywhere or without one, and whole conversations that show it in any turn."""
    rng = random.Random(0)
    for _ in range(150):
        question = drawn(rng, 8)
        if rng.random() < 0.6:
            at = rng.randint(0, len(question))
            question = question[:at] + IMAGE + question[at:]
        wanted = encode_prompt(vocabulary_of(written.base), question, written.count)
        pictures = PICTURE if IMAGE in question else None
        assert encode_prompt(vocabulary_of(written.ours), question, written.count) == wanted, question
        assert written.stock(text=VICUNA.prompt(question), images=pictures).input_ids[0] == wanted, question
    for _ in range(50):
        turns = [(drawn(rng, 5).replace(SYSTEM, ""), rng.choice(["a dog", "2", " B", "[0.1, 0.2]"])) for _ in range(3)]
        shown = rng.randrange(3)
        turns[shown] = (turns[shown][0] + IMAGE, turns[shown][1])
        wanted = encode(vocabulary_of(written.base), turns, written.count, 9999)
        assert encode(vocabulary_of(written.ours), turns, written.count, 9999) == wanted
        assert written.stock(text=VICUNA.layout(turns)[0], images=PICTURE).input_ids[0] == wanted.input_ids, turns


def test_any_text_around_the_picture_is_split_as_by_itself(written):
    """The oracle: the base's own tokenizer on every part, of which the first keeps its beginning of text."""
    rng, tokenizer = random.Random(1), written.base.tokenizer
    image, begin = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer("").input_ids  # <s>, if the tokenizer puts one
    for _ in range(400):
        text = drawn(rng, 10, IMAGE, IMAGE, VICUNA.end, "<s>")
        first, *others = [tokenizer(part).input_ids for part in text.split(IMAGE)]
        wanted = first + [token for other in others for token in (image, *other[len(begin) :])]
        assert written.stock.tokenizer(text).input_ids == wanted, text


def test_a_written_folder_is_a_base_like_the_first(written, tmp_path):
    """Written again it has the same files, and its pictures and special tokens are the base's."""
    write_processor(written.ours, written.config, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (written.folder / file.name).read_bytes(), file.name
    old, new = written.base.tokenizer, written.ours.tokenizer
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "model_max_length", "padding_side"):
        assert getattr(old, name) == getattr(new, name), name
    assert len(old) == len(new) and old.get_vocab() == new.get_vocab()
    pixels = [
        p.image_processor(PICTURE)["pixel_values"][0].tolist() for p in (written.base, written.ours, written.stock)
    ]
    assert pixels[0] == pixels[1] == pixels[2]


@pytest.mark.parametrize("legacy", [True, False])
def test_an_assembled_folder_assembles_again(legacy, tmp_path):
    """tokenizer.json says which kind it is, since the class that takes it as it is has no such setting."""
    llm = shutil.copytree(ORIGINAL / "vicuna-tiny", tmp_path / "vicuna")
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    write_base(read_base(llm, ORIGINAL / "clip-tiny-patch14-42", ORIGINAL / "mm_projector.bin"), tmp_path / "out")
    first, second = (Vocabulary.of(load_tokenizer(folder), VICUNA) for folder in (llm, tmp_path / "out"))
    turns = [("<image>\nWhat?", "a dog"), ("  x", "é")]
    assert encode(first, turns, 9, 999) == encode(second, turns, 9, 999)


def test_words_of_the_shipped_base_are_not_lost_by_assembling():
    with pytest.raises(ValueError, match=r"tiny-llava.*A chat between.*behind its vocabulary"):
        read_base(SHIPPED)


def turn(role, text, shown=False):
    return {"role": role, "content": [{"type": "image"}] * shown + [{"type": "text", "text": text}]}


def test_the_chat_template_is_our_prompt(written):
    template = AutoProcessor.from_pretrained(written.folder).apply_chat_template
    rng = random.Random(2)
    for _ in range(150):
        question, shown = drawn(rng, 8), rng.random() < 0.5
        wanted = VICUNA.prompt(IMAGE * shown + question)
        assert template([turn("user", question, shown)], add_generation_prompt=True) == wanted
        asked = [{"role": "user", "content": IMAGE * shown + question}]
        assert template(asked, add_generation_prompt=True) == wanted
        assert written.stock.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == wanted
        turns, shown = [(drawn(rng, 4), drawn(rng, 4)) for _ in range(rng.randint(1, 3))], rng.choice([0, 1, 2, None])
        messages = [
            turn(role, text, role == "user" and number == shown)
            for number, pair in enumerate(turns)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        if shown is not None and shown < len(turns):
            turns[shown] = (IMAGE + turns[shown][0], turns[shown][1])
        whole, _ = VICUNA.layout(turns)
        assert template(messages) == whole
        asking = template([*messages, turn("user", "x")], add_generation_prompt=True)
        assert asking == f"{whole}USER: x ASSISTANT:"


def test_the_chat_template_tokenises_and_shows_the_picture(written):
    message = turn("user", "What is it?", True)
    message["content"][0] = {"type": "image", "image": PICTURE}
    batch = written.stock.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert batch["input_ids"][0] == encode_prompt(vocabulary_of(written.base), f"{IMAGE}\nWhat is it?", written.count)
    assert len(batch["pixel_values"]) == 1


def test_what_the_prompt_cannot_say_is_refused(written):
    template = written.stock.apply_chat_template
    for messages, message in (
        ([{"role": "user", "content": [{"type": "image"}] * 2}], "at most one image"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not video"),
        ([turn("user", "x"), {"role": "system", "content": "y"}], "system message stands first"),
    ):
        with pytest.raises(Exception, match=message):
            template(messages)
    assert template([{"role": "system", "content": "Be brief."}, turn("user", "x")]) == "Be brief. USER: x"


def test_transformers_4_finds_the_names_that_it_reads(written):
    """Held to the file: 4.57 knows no TokenizersBackend, needs preprocessor_config.json and takes a list of extra
    tokens under another name."""
    read = {file.name: json.loads(file.read_text()) for file in written.folder.glob("*.json")}
    assert (written.folder / "chat_template.jinja").read_text() == written.stock.chat_template
    assert read["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read["tokenizer_config.json"]["additional_special_tokens"] == [IMAGE]
    assert read["tokenizer_config.json"]["model_input_names"] == ["input_ids", "attention_mask"]
    assert "extra_special_tokens" not in read["tokenizer_config.json"]
    assert read["preprocessor_config.json"]["image_processor_type"] == "LlavaImageProcessor"
    assert read["preprocessor_config.json"]["do_pad"] is True
    assert read["processor_config.json"]["processor_class"] == "LlavaProcessor"
    assert read["processor_config.json"]["patch_size"] == written.config.vision_config.patch_size


def test_rotary_settings_stand_under_both_names(tmp_path):
    base = read_base(ORIGINAL / "vicuna-tiny", ORIGINAL / "clip-tiny-patch14-42", ORIGINAL / "mm_projector.bin")
    base.config.text_config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    write_base(base, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5e5 and text["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    again = config_of(tmp_path).text_config.rope_parameters
    assert again == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
