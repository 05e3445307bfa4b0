"""A small world of talk: a customer and a seller deal. Eight tasks about it, and simpler ones to learn from before.

A task is a definition and a function from a `random.Random` to an input and its output, as in Natural Instructions.
The simpler ones (`FIRST`) share words with the eight, and none of their definitions and forms of answers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from data.mini.world import COLORS

GOODS = {
    "animals": ["cats", "dogs", "rabbits", "bears", "cows", "pigs", "frogs", "birds", "ducks", "owls", "turtles"],
    "fruits": ["apples", "pears", "lemons", "bananas", "melons", "grapes", "cherries", "plums"],
    "tools": ["hammers", "brooms", "spoons", "keys", "saws", "nails"],
    "garments": ["socks", "hats", "coats", "gloves", "shirts"],
    "instruments": ["guitars", "trumpets", "drums", "flutes"],
    "plants": ["roses", "tulips", "palms", "herbs"],
}
KIND_OF = {item: kind for kind, items in GOODS.items() for item in items}
NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Nils",
]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
Instance = tuple[str, str]  # input and output


@dataclass(frozen=True)
class Deal:
    """What a dialogue is about: who wants how many of what, what it costs, and whether it is bought."""

    name: str
    item: str
    color: str
    count: str
    price: str
    agreed: bool

    def lines(self, rng: random.Random) -> list[str]:
        """What the two say, a line each by turns; only the words differ from one time to the other."""
        accept = ("Good, I take them.", "Fine, that is a fair price.", "Yes, here is the money.")
        refuse = ("No, that is too much.", "Sorry, then I take nothing.", "Oh, I do not have that much.")
        return [
            "Customer: "
            + rng.choice(("Hello, I am {0}. Do you have {1} {2}?", "Hi, {0} here. I want to see {1} {2}."))
            .format(self.name, self.color, self.item),
            "Seller: " + rng.choice(("Yes, we do. How many?", "Of course. How many do you need?")),
            "Customer: " + rng.choice(("I need {0}.", "Give me {0}.", "{0} of them.")).format(self.count),
            "Seller: " + rng.choice(("That makes {0} coins.", "You pay {0} coins.")).format(self.price),
            "Customer: " + rng.choice(accept if self.agreed else refuse),
        ]  # fmt: skip

    def facts(self) -> list[tuple[str, str]]:
        """What can be asked of it."""
        return [("item", self.item), ("color", self.color), ("count", self.count), ("price", self.price)]


def deal(rng: random.Random) -> Deal:
    """A random one."""
    item = rng.choice(rng.choice(list(GOODS.values())))
    numbers = rng.choice(NUMBERS), rng.choice(NUMBERS)
    return Deal(rng.choice(NAMES), item, rng.choice(list(COLORS)), *numbers, rng.random() < 0.5)


def _goods_answer(rng: random.Random) -> Instance:
    one = deal(rng)
    asked, answer = rng.choice([*one.facts(), ("name", one.name)])
    return "\n".join([*one.lines(rng), f"Question: What is the {asked}?"]), answer


def _order_facts(rng: random.Random) -> Instance:
    one = deal(rng)
    return "\n".join(one.lines(rng)), "; ".join(f"{key} = {value}" for key, value in one.facts())


def _deal_classification(rng: random.Random) -> Instance:
    one = deal(rng)
    return "\n".join(one.lines(rng)), "deal" if one.agreed else "no deal"


def _kind_classification(rng: random.Random) -> Instance:
    kind = rng.choice(list(GOODS))
    one = deal(rng)
    one = Deal(one.name, rng.choice(GOODS[kind]), one.color, one.count, one.price, one.agreed)
    return "\n".join(one.lines(rng)), f"goods of kind {kind}"


def _shuffled_facts(rng: random.Random, one: Deal, *keys: str) -> str:
    facts = [(key, value) for key, value in [("name", one.name), *one.facts()] if key in keys]
    rng.shuffle(facts)
    return ", ".join(f"{key}: {value}" for key, value in facts)


def _order_sentence(rng: random.Random) -> Instance:
    one = deal(rng)
    said = _shuffled_facts(rng, one, "name", "item", "color", "count", "price")
    return said, f"{one.name} buys {one.count} {one.color} {one.item} for {one.price} coins."


def _customer_utterance(rng: random.Random) -> Instance:
    one = deal(rng)
    said = _shuffled_facts(rng, one, "name", "item", "color", "price")
    return said, f"My name is {one.name}, could you sell me {one.color} {one.item} below {one.price} coins?"


def _closing(one: Deal) -> str:
    if one.agreed:
        return f"Thank you {one.name}, enjoy your {one.item}!"
    return f"What a pity {one.name}, come back for the {one.item} another day."


def _seller_reply(rng: random.Random) -> Instance:
    one = deal(rng)
    return "\n".join(one.lines(rng)), f"Seller: {_closing(one)}"


def _choose_next(rng: random.Random) -> Instance:
    one, turn = deal(rng), rng.choice((2, 3, 5))
    lines = [*one.lines(rng), f"Seller: {_closing(one)}"]
    options = [lines[turn], *rng.sample([line for at, line in enumerate(lines) if at not in (turn, turn - 1)], 2)]
    rng.shuffle(options)
    listed = [f"({number}) {line.partition(': ')[2]}" for number, line in enumerate(options, 1)]
    number = options.index(lines[turn]) + 1
    return "\n".join([*lines[:turn], "Replies:", *listed]), f"({number}) {lines[turn].partition(': ')[2]}"


class Task(NamedTuple):
    """Wordings of what is asked, of which a stream's task has one, and what makes an input and its output."""

    definitions: tuple[str, ...]
    make: Callable[[random.Random], Instance]


_GIVEN = "In this task, you are given a dialogue between a customer and a seller"
_FACTS = "In this task, you are given facts about an order"
TASKS = {
    "mini1_goods_answer_generation": Task(
        (f"{_GIVEN}, and a question about the order. Answer the question with one word.",), _goods_answer
    ),
    "mini2_deal_classification": Task(
        (f"{_GIVEN}. Classify how it ends: the answer is one of deal, no deal.",), _deal_classification
    ),
    "mini3_order_sentence_generation": Task(
        (f"{_FACTS}. Write one sentence that tells who buys what.",), _order_sentence
    ),
    "mini4_seller_reply_generation": Task(
        (f"{_GIVEN}. Write the reply of the seller that comes next.",), _seller_reply
    ),
    "mini5_order_facts_generation": Task(
        (f"{_GIVEN}. List the facts of the order: item, color, count, price.",), _order_facts
    ),
    "mini6_kind_classification": Task(
        (f"{_GIVEN}. Classify the goods: the answer is goods of kind, and one of {', '.join(GOODS)}.",),
        _kind_classification,
    ),
    "mini7_customer_utterance_generation": Task(
        (f"{_FACTS}. Write one sentence that the customer could say.",), _customer_utterance
    ),
    "mini8_choose_next": Task(
        (f"{_GIVEN}, and three replies. Choose the reply that comes next, and repeat it.",), _choose_next
    ),
}  # fmt: skip

WORDS = [*KIND_OF, *COLORS, *NAMES, *NUMBERS]


def _words(rng: random.Random, most: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(2, most))


def _of_words(answer: Callable[[list[str]], str]) -> Callable[[random.Random], Instance]:
    def make(rng: random.Random) -> Instance:
        words = _words(rng)
        return " ".join(words), answer(words)

    return make


def _look_up(rng: random.Random) -> Instance:
    pairs = list(zip(rng.sample(NAMES, 4), rng.sample(list(KIND_OF), 4), strict=True))
    name, item = rng.choice(pairs)
    return ", ".join(f"{name}: {item}" for name, item in pairs) + f". What has {name}?", f"It has {item}"


def _who_speaks(rng: random.Random) -> Instance:
    lines = deal(rng).lines(rng)
    line = rng.choice(lines)
    who, _, said = line.partition(": ")
    return "\n".join([*lines, f"Line: {said}"]), f"This is the {who.lower()}"


def _line_after(rng: random.Random) -> Instance:
    lines = deal(rng).lines(rng)
    at = rng.randrange(len(lines) - 1)
    return "\n".join([*lines, f"Line: {lines[at].partition(': ')[2]}"]), lines[at + 1].partition(": ")[2]


def _kind(rng: random.Random) -> Instance:
    kind = rng.choice(list(GOODS))
    return rng.choice(GOODS[kind]), f"They are {kind}"


def _replace(rng: random.Random) -> Instance:
    words = _words(rng)
    old, new = rng.choice(words), rng.choice(WORDS)
    return f"{' '.join(words)}. Put {new} for {old}", " ".join(new if word == old else word for word in words)


def _name_colors(rng: random.Random) -> Instance:
    words = _words(rng, 8)
    found = [word for word in words if word in COLORS]
    return " ".join(words), " and ".join(found) if found else "none"


FIRST = {
    "copy": Task(("Repeat the words.", "Write the same words once more."), _of_words(" ".join)),
    "reverse": Task(("Write the words in reverse.", "Begin with the last word and end with the first."),
                    _of_words(lambda words: " ".join(reversed(words)))),
    "first": Task(("Write the first word alone.", "Which word comes first?"), _of_words(lambda words: words[0])),
    "last": Task(("Write the last word alone.", "Which word comes last?"), _of_words(lambda words: words[-1])),
    "number": Task(("How many words are there?", "Count the words."),
                   _of_words(lambda words: f"there are {NUMBERS[len(words) - 1]}")),
    "sort": Task(("Sort the words by their letters.", "Write the words as a dictionary has them."),
                 _of_words(lambda words: " ".join(sorted(words, key=str.lower)))),
    "look_up": Task(("Find what belongs to the name.", "You are given a list; answer the question."), _look_up),
    "who_speaks": Task(("You are given a dialogue and a line of it. Who says the line?",), _who_speaks),
    "line_after": Task(("You are given a dialogue and a line of it. Repeat the line after it.",), _line_after),
    "kind": Task(("What kind of goods are these?", "Name the kind of the goods."), _kind),
    "replace": Task(("Do what is said at the end.", "Change the words as it is asked."), _replace),
    "colors": Task(("Write the colors that you find.", "Which colors are there?"), _name_colors),
}  # fmt: skip


def story(rng: random.Random) -> str:
    """A text about a deal, to learn words from: the dialogue, or what a third person tells of it."""
    one = deal(rng)
    if rng.random() < 0.6:
        return "\n".join(one.lines(rng))
    told = [
        f"{one.name} looks at the {one.color} {one.item} of the seller.",
        f"All {one.item} are {KIND_OF[one.item]}.",
        f"The seller has {one.count} of them and asks {one.price} coins.",
        f"In the end {one.name} {'pays and goes home' if one.agreed else 'goes home without them'}.",
    ]
    rng.shuffle(told)
    return " ".join(told)
