"""The vicuna_v1 conversation: how questions and answers become one prompt, its tokens and its supervised span.

Everything here reproduces LLaVA-1.5's preprocessing token by token, except that the labels do not come from counting
tokens turn by turn: every token knows the characters it was made from, and is supervised when they belong to an answer.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

from data.columns import Tokenised
from data.pictures import shown
from data.records import IMAGE

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"
IGNORE = -100

Turns = Sequence[tuple[str, str]]
"""Question and answer, in order. The one question that shows the picture holds `<image>`."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence: token ids and, of the same length, labels (`IGNORE` where nothing is supervised)."""

    input_ids: list[int]
    labels: list[int]


class TextTokens(NamedTuple):
    """The tokens of a text. `parts`: of each part around the placeholders, its first character, its first token, how
    many tokens its encoding has before that one, and the characters [begin, end) of all of its encoding's tokens."""

    ids: list[int]
    parts: list[tuple[int, int, int, list[tuple[int, int]]]]

    def first_from(self, position: int) -> int:
        """Return the first token that begins at the character `position` or behind it; a placeholder begins with its
        `<image>`."""
        begin, first, skip, offsets = next(part for part in reversed(self.parts) if part[0] <= position)
        return first + max(bisect_left(offsets, (position - begin,)) - skip, 0)


class Vocabulary:
    """What tokenising needs of a tokenizer, without transformers: the same ids at a fraction of the time. An encoder of
    data/columns.py.

    `backend` is the fast tokenizer's own, `bos` its first token or None, `image` the placeholder's id.
    """

    def __init__(self, backend: Tokenizer, bos: int | None, image: int):
        self.backend, self.bos, self.image = backend, bos, image
        self._spell = lru_cache(1 << 16)(lambda ids: backend.decode(list(ids), skip_special_tokens=False))

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        """That of a tokenizer of transformers. Raises ValueError if it has no `<image>`, or ends every text with a
        token of its own."""
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        if image is None or image == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {IMAGE} token: add it, as a special token, before encoding")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # transformers sets both anew for every call of its own
        backend.no_padding()
        if backend.encode("a").special_tokens_mask[-1]:
            raise ValueError("the tokenizer puts a token behind every text; LLaVA's adds none but <s> in front")
        return cls(backend, tokenizer.bos_token_id, image)

    def __reduce__(self):
        return Vocabulary, (self.backend, self.bos, self.image)

    @property
    def digest(self) -> str:
        """What tells vocabularies apart."""
        content = f"{self.bos} {self.image} {self.backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def questions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that ask for an answer to each text; `<image>` stands for its picture."""
        return [tokens.ids for tokens in self.tokenise([render_prompt(text) for text in texts])]

    def tokenise(self, texts: Sequence[str]) -> list[TextTokens]:
        """Return the tokens of each text.

        The text on either side of the picture is tokenised by itself, as the original does: the tokens next to the
        picture are then those of a text's beginning and end, and only the first part keeps its BOS.
        """
        split = [text.split(IMAGE) for text in texts]
        distinct = list(dict.fromkeys(part for parts in split for part in parts))
        encodings = self.backend.encode_batch(distinct)
        known = {part: (encoding.ids, encoding.offsets) for part, encoding in zip(distinct, encodings, strict=True)}
        found = []
        for parts in split:
            tokens, position = TextTokens([], []), 0
            for number, part in enumerate(parts):
                if number:
                    tokens.ids.append(self.image)
                    position += len(IMAGE)
                ids, offsets = known[part]
                skip = int(number > 0 and ids[:1] == [self.bos])
                tokens.parts.append((position, len(tokens.ids), skip, offsets))
                tokens.ids.extend(ids[skip:])
                position += len(part)
            found.append(tokens)
        return found

    def conversations(self, conversations: Sequence[Turns]) -> list[Tokenised | ValueError]:
        """Return the tokens of each conversation. A ValueError stands in the place of one with an answer that cannot
        be read back from its supervised tokens."""
        laid_out = [_layout(turns) for turns in conversations]
        found: list[Tokenised | ValueError] = []
        tokenised = self.tokenise([text for text, _ in laid_out])
        for turns, (_, spans), tokens in zip(conversations, laid_out, tokenised, strict=True):
            answers = [(tokens.first_from(begin), tokens.first_from(end)) for begin, end in spans]
            fault = self._misspelled(turns, answers, tokens.ids)
            found.append(fault or Tokenised(tokens.ids, answers))
        return found

    def _misspelled(self, turns: Turns, answers: list[tuple[int, int]], ids: list[int]) -> ValueError | None:
        for (_, answer), (begin, end) in zip(turns, answers, strict=True):
            spelled = self._spell(tuple(ids[begin:end]))
            if spelled.strip() != f"{answer}{END}".strip():
                return ValueError(
                    f"the tokens of the answer {shown(answer)} spell {shown(spelled)}; the tokenizer cannot express it"
                )
        return None


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
    vocabulary = Vocabulary.of(tokenizer)
    [found] = vocabulary.conversations([turns])
    if isinstance(found, ValueError):
        raise found
    labels = [IGNORE] * len(found.ids)
    for begin, end in found.answers:
        labels[begin:end] = found.ids[begin:end]
    picture = found.ids.index(vocabulary.image) if vocabulary.image in found.ids else None
    if picture is not None:
        labels[picture : picture + 1] = [IGNORE] * image_tokens
    if fault := cut_fault(max_length, image_tokens, picture, found.answers[0][0]):
        raise ValueError(fault)
    return Encoded(repeated(found.ids, vocabulary.image, image_tokens)[:max_length], labels[:max_length])


def cut_fault(max_length: int, image_tokens: int, picture: int | None, answer: int) -> str | None:
    """Return what is wrong with a conversation that ends at `max_length` tokens, None if it can be trained on.

    `picture` and `answer` are the positions of the placeholder and of the first supervised token, the picture counted
    as one token.
    """
    room = max_length - (image_tokens - 1 if picture is not None else 0)
    if picture is not None and picture >= room:
        return "the maximum length cuts the picture; raise max_length or shorten the text"
    if answer >= room:
        return "the maximum length leaves no part of an answer; raise max_length or shorten the text"
    return None


def repeated(ids: Sequence[int], image: int, image_tokens: int) -> list[int]:
    """Return `ids` with `image_tokens` placeholders where there is one."""
    if image not in ids:
        return list(ids)
    at = ids.index(image)
    return [*ids[:at], *[image] * image_tokens, *ids[at + 1 :]]


def encode_prompt(tokenizer, question: str, image_tokens: int) -> list[int]:
    """Return the token ids that ask for an answer to `question`; `<image>` in it stands for the picture, if any."""
    vocabulary = Vocabulary.of(tokenizer)
    return repeated(vocabulary.questions([question])[0], vocabulary.image, image_tokens)


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
