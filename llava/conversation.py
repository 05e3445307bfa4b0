"""The vicuna_v1 conversation: how questions and answers become one prompt, its tokens and its supervised span.

Everything here reproduces LLaVA-1.5's preprocessing token by token, except that the labels do not come from counting
tokens turn by turn: every token knows the characters it was made from, and is supervised when they belong to an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
END = "</s>"
IGNORE = -100

Turns = Sequence[tuple[str, str]]
"""Question and answer, in order. The one question that shows the picture holds `<image>`."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence: token ids and, of the same length, labels (`IGNORE` where nothing is supervised)."""

    input_ids: list[int]
    labels: list[int]


def place_image(question: str) -> str:
    """Return `question` with its `<image>` moved to the front, on a line of its own, as LLaVA does before rendering."""
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def render(turns: Turns) -> str:
    """Return the whole conversation as the text the model is trained on."""
    return _layout(turns)[0]


def render_prompt(question: str) -> str:
    """Return the text that asks the model for an answer; it ends in `ASSISTANT:` without a space."""
    return f"{SYSTEM} USER: {_placed(question)} ASSISTANT:"


def encode(tokenizer, turns: Turns, image_tokens: int, max_length: int) -> Encoded:
    """Tokenise a conversation for training.

    `image_tokens` placeholders stand for the picture, one for each of its patches. Supervised are the answers, each
    with the space before it and the `</s>` behind it. Sequences end at `max_length` tokens, placeholders included.

    Raises ValueError if an answer cannot be read back from its supervised tokens, or if the cut leaves a part of the
    picture or no supervised token at all.
    """
    text, answers = _layout(turns)
    ids, starts = _tokenize(tokenizer, text, image_tokens)
    supervised = [any(begin <= start < end for begin, end in answers) for start in starts]
    _check_answers(tokenizer, turns, answers, ids, starts)

    labels = [token if learn else IGNORE for token, learn in zip(ids, supervised, strict=True)]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if image in ids[max_length:]:
        raise ValueError("the maximum length cuts the picture; raise it or shorten the text")
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels):
        raise ValueError("the maximum length leaves no part of an answer; raise it or shorten the text")
    return Encoded(ids, labels)


def encode_prompt(tokenizer, question: str, image_tokens: int) -> list[int]:
    """Return the token ids that ask for an answer to `question`; `<image>` in it stands for the picture, if any."""
    return _tokenize(tokenizer, render_prompt(question), image_tokens)[0]


def _placed(question: str) -> str:
    return place_image(question) if IMAGE in question else question


def _layout(turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered text and, for every answer, the characters it owns: from its leading space to its `</s>`."""
    text, answers = SYSTEM + " ", []
    for question, answer in turns:
        text += f"USER: {_placed(question)} ASSISTANT:"
        begin = len(text)
        text += f" {answer}{END}"
        answers.append((begin, len(text)))
    return text, answers


def _tokenize(tokenizer, text: str, image_tokens: int) -> tuple[list[int], list[int]]:
    """Return the ids of `text` and the character at which each begins; a placeholder begins where `<image>` does.

    The text on either side of the picture is tokenised by itself, as the original does: the tokens next to the picture
    are then those of a text's beginning and end, and only the first part keeps its BOS.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if image is None or image == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {IMAGE} token: add it, as a special token, before encoding")
    ids, starts, position = [], [], 0
    for number, part in enumerate(text.split(IMAGE)):
        if number:
            ids += [image] * image_tokens
            starts += [position] * image_tokens
            position += len(IMAGE)
        tokens = tokenizer(part, return_offsets_mapping=True)
        skip = int(number > 0 and tokens.input_ids[:1] == [tokenizer.bos_token_id])
        ids += tokens.input_ids[skip:]
        starts += [position + begin for begin, _ in tokens.offset_mapping[skip:]]
        position += len(part)
    return ids, starts


def _check_answers(tokenizer, turns: Turns, answers: list[tuple[int, int]], ids: list[int], starts: list[int]) -> None:
    """Raise ValueError unless the supervised tokens of every turn spell its answer and the end of the turn."""
    for (_, answer), (begin, end) in zip(turns, answers, strict=True):
        tokens = [token for token, start in zip(ids, starts, strict=True) if begin <= start < end]
        spelled = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if spelled.strip() != f"{answer}{END}".strip():
            raise ValueError(f"the tokens of the answer {answer!r} spell {spelled!r}; the tokenizer cannot express it")
