"""How questions and answers become one prompt, its tokens and its supervised span, by a family's template.

The labels do not come from counting tokens turn by turn, as in the original: every token knows the characters it was
made from, and is supervised when they belong to an answer.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

from data.columns import Tokenised
from data.pictures import shown
from data.records import IMAGE

IGNORE = -100

Turns = Sequence[tuple[str, str]]
"""Question and answer, in order. The one question that shows the picture holds `IMAGE`, the records' word for it."""


@dataclass(frozen=True)
class Template:
    """A family's words around questions and answers: `system` once, then for every turn `user`, the question,
    `assistant` and the answer. An answer owns `lead` before it and `end`, the tokenizer's end of text, behind it.

    placeholder: the token that stands for a picture, between `before` and `after` in front of the question; None: the
    family takes no pictures. gap: what stands between an answer's end and the next turn; several: there may be one.
    """

    system: str
    user: str
    assistant: str
    lead: str
    end: str
    placeholder: str | None
    before: str = ""
    after: str = "\n"
    gap: str = ""
    several: bool = True

    def prompt(self, question: str) -> str:
        """Return the text that asks for an answer. Raises ValueError for a picture where the family takes none."""
        return f"{self.system}{self.user}{self._placed(question)}{self.assistant}"

    def layout(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the characters [begin, end) that each answer owns. Raises as `prompt`
        does, and for several turns where the family answers once."""
        if len(turns) > 1 and not self.several:
            raise ValueError(f"it has {len(turns)} turns, and this base model answers once; make a record of each turn")
        text, answers = self.system, []
        for number, (question, answer) in enumerate(turns):
            text += f"{self.gap if number else ''}{self.user}{self._placed(question)}{self.assistant}"
            begin = len(text)
            if (word := self.placeholder) is not None and word in answer:
                raise ValueError(f"an answer holds {word}, this base model's word for a picture; take it out")
            text += f"{self.lead}{answer}{self.end}"
            answers.append((begin, len(text)))
        return text, answers

    def _placed(self, question: str) -> str:
        if self.placeholder not in (None, IMAGE) and self.placeholder in question:
            raise ValueError(f"it holds {self.placeholder}, this base model's word for a picture; take it out")
        if IMAGE not in question:
            return question
        if self.placeholder is None:
            raise ValueError("it shows a picture, and this base model takes none: use a base that does")
        picture = f"{self.before}{self.placeholder}{self.after}"
        return f"{picture}{question.replace(IMAGE, '').strip()}".strip()


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
        first character."""
        begin, first, skip, offsets = next(part for part in reversed(self.parts) if part[0] <= position)
        return first + max(bisect_left(offsets, (position - begin,)) - skip, 0)


class Vocabulary:
    """What tokenising needs of a tokenizer, without transformers: the same ids at a fraction of the time. An encoder of
    data/columns.py.

    `backend` is the fast tokenizer's own, `bos` its first token or None, `image` the placeholder's id or None.
    """

    def __init__(self, backend: Tokenizer, template: Template, bos: int | None, image: int | None):
        self.backend, self.template, self.bos, self.image = backend, template, bos, image
        self._spell = lru_cache(1 << 16)(lambda ids: backend.decode(list(ids), skip_special_tokens=False))

    @classmethod
    def of(cls, tokenizer, template: Template) -> "Vocabulary":
        """That of a tokenizer of transformers. Raises ValueError if it lacks the template's placeholder, or ends every
        text with a token of its own."""
        image = None
        if template.placeholder is not None:
            image = tokenizer.convert_tokens_to_ids(template.placeholder)
            if image is None or image == tokenizer.unk_token_id:
                word = template.placeholder
                raise ValueError(f"the tokenizer has no {word} token: add it, as a special token, before encoding")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # transformers sets both anew for every call of its own
        backend.no_padding()
        if backend.encode("a").special_tokens_mask[-1]:
            raise ValueError("the tokenizer puts a token behind every text; it should add none but the first one")
        return cls(backend, template, tokenizer.bos_token_id, image)

    def __reduce__(self):
        return Vocabulary, (self.backend, self.template, self.bos, self.image)

    @property
    def digest(self) -> str:
        """What tells vocabularies apart."""
        content = f"{self.bos} {self.image} {self.template} {self.backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def questions(self, texts: Sequence[str]) -> list[list[int] | ValueError]:
        """Return the ids that ask for an answer to each text, one placeholder for its picture. A ValueError stands in
        the place of one that the family cannot be asked."""
        prompts = [_attempt(self.template.prompt, text) for text in texts]
        tokens = iter(self.tokenise([prompt for prompt in prompts if isinstance(prompt, str)]))
        return [next(tokens).ids if isinstance(prompt, str) else prompt for prompt in prompts]

    def tokenise(self, texts: Sequence[str]) -> list[TextTokens]:
        """Return the tokens of each text.

        The text on either side of the picture is tokenised by itself, as the original does: the tokens next to the
        picture are then those of a text's beginning and end, and only the first part keeps its BOS.
        """
        word = self.template.placeholder
        split = [text.split(word) if word else [text] for text in texts]
        distinct = list(dict.fromkeys(part for parts in split for part in parts))
        encodings = self.backend.encode_batch(distinct)
        known = {part: (encoding.ids, encoding.offsets) for part, encoding in zip(distinct, encodings, strict=True)}
        found = []
        for parts in split:
            tokens, position = TextTokens([], []), 0
            for number, part in enumerate(parts):
                if number:
                    tokens.ids.append(self.image)
                    position += len(word)
                ids, offsets = known[part]
                skip = int(number > 0 and ids[:1] == [self.bos])
                tokens.parts.append((position, len(tokens.ids), skip, offsets))
                tokens.ids.extend(ids[skip:])
                position += len(part)
            found.append(tokens)
        return found

    def conversations(self, conversations: Sequence[Turns]) -> list[Tokenised | ValueError]:
        """Return the tokens of each conversation. A ValueError stands in the place of one with an answer that cannot
        be read back from its supervised tokens, and of one that the family cannot be shown."""
        laid_out = [_attempt(self.template.layout, turns) for turns in conversations]
        tokenised = iter(self.tokenise([one[0] for one in laid_out if not isinstance(one, ValueError)]))
        found: list[Tokenised | ValueError] = []
        for turns, one in zip(conversations, laid_out, strict=True):
            if isinstance(one, ValueError):
                found.append(one)
                continue
            tokens = next(tokenised)
            answers = [(tokens.first_from(begin), tokens.first_from(end)) for begin, end in one[1]]
            fault = self._misspelled(turns, answers, tokens.ids)
            found.append(fault or Tokenised(tokens.ids, answers))
        return found

    def _plain(self, text: str) -> str:
        """The text as the tokenizer sees it: in its normal form, and with single spaces, all that T5 knows."""
        normalizer = self.backend.normalizer
        return " ".join((normalizer.normalize_str(text) if normalizer else text).split())

    def _misspelled(self, turns: Turns, answers: list[tuple[int, int]], ids: list[int]) -> ValueError | None:
        for (_, answer), (begin, end) in zip(turns, answers, strict=True):
            spelled, said = self._spell(tuple(ids[begin:end])), f"{answer}{self.template.end}"
            alike = spelled.strip() == said.strip() or self._plain(spelled) == self._plain(said)
            if self.template.end in answer or not alike:
                return ValueError(
                    f"the tokens of the answer {shown(answer)} spell {shown(spelled)}; the tokenizer cannot express it"
                )
        return None


def encode(vocabulary: Vocabulary, turns: Turns, picture_tokens: int, max_length: int) -> Encoded:
    """Tokenise a conversation for training.

    `picture_tokens` placeholders stand for the picture. Supervised are the answers, each with the template's lead
    before it and its end of text behind it. Sequences end at `max_length` tokens, placeholders included.

    Raises ValueError for what `Vocabulary.conversations` refuses, and if the cut leaves a part of the picture or no
    supervised token at all.
    """
    [found] = vocabulary.conversations([turns])
    if isinstance(found, ValueError):
        raise found
    labels = [IGNORE] * len(found.ids)
    for begin, end in found.answers:
        labels[begin:end] = found.ids[begin:end]
    picture = found.ids.index(vocabulary.image) if vocabulary.image in found.ids else None
    if picture is not None:
        labels[picture : picture + 1] = [IGNORE] * picture_tokens
    if fault := cut_fault(max_length, picture_tokens, picture, found.answers[0][0]):
        raise ValueError(fault)
    return Encoded(repeated(found.ids, vocabulary.image, picture_tokens)[:max_length], labels[:max_length])


def cut_fault(max_length: int, picture_tokens: int, picture: int | None, answer: int) -> str | None:
    """Return what is wrong with a conversation that ends at `max_length` tokens, None if it can be trained on.

    `picture` and `answer` are the positions of the placeholder and of the first supervised token, the picture counted
    as one token.
    """
    room = max_length - (picture_tokens - 1 if picture is not None else 0)
    if picture is not None and picture >= room:
        return "the maximum length cuts the picture; raise max_length or shorten the text"
    if answer >= room:
        return "the maximum length leaves no part of an answer; raise max_length or shorten the text"
    return None


def repeated(ids: Sequence[int], image: int | None, picture_tokens: int) -> list[int]:
    """Return `ids` with `picture_tokens` placeholders where there is one."""
    if image not in ids:
        return list(ids)
    at = ids.index(image)
    return [*ids[:at], *[image] * picture_tokens, *ids[at + 1 :]]


def encode_prompt(vocabulary: Vocabulary, question: str, picture_tokens: int) -> list[int]:
    """Return the token ids that ask for an answer to `question`, with so many placeholders for its picture, if it shows
    one. Raises ValueError as `Template.prompt` does."""
    [ids] = vocabulary.questions([question])
    if isinstance(ids, ValueError):
        raise ids
    return repeated(ids, vocabulary.image, picture_tokens)


def _attempt(make: Callable, value):
    """What `make` makes of a value, or the ValueError that it raises."""
    try:
        return make(value)
    except ValueError as error:
        return error
