"""The nouns of WordNet (Fellbaum 1998), from its own files as its manual describes them, wndb(5WN) and cntlist(5WN)."""

from pathlib import Path

from data.packages import shared

SOURCE = shared("wordnet")  # of Debian's package wordnet-base


class Nouns:
    """What is a kind of what. A synset is the number that data.noun gives it.

    senses: word -> its synsets, the most frequent first; met: word -> how often its first sense was met in the texts
    that WordNet's authors tagged; glosses: synset -> what it means, in words. Raises FileNotFoundError where the files
    are not.
    """

    def __init__(self, source: Path = SOURCE):
        for name in ("index.noun", "data.noun", "cntlist.rev"):
            if not (source / name).is_file():
                raise FileNotFoundError(
                    f"{source / name}: no WordNet there; bash scripts/make_small_llava.sh fetches it, or "
                    "apt install wordnet-base"
                )
        self.senses: dict[str, list[int]] = {}
        for line in _lines(source / "index.noun"):
            word, _, count, pointers, *rest = line.split()
            offsets = rest[int(pointers) + 2 :][: int(count)]
            self.senses[word.replace("_", " ")] = [int(offset) for offset in offsets]
        self.met: dict[str, int] = {}
        for line in _lines(source / "cntlist.rev"):
            key, number, times = line.split()
            word, _, kind = key.partition("%")
            if kind.startswith("1:") and number == "1":  # a noun
                self.met[word.replace("_", " ")] = int(times)
        self._above: dict[int, list[int]] = {}
        self.glosses: dict[int, str] = {}
        for line in _lines(source / "data.noun"):
            data, _, gloss = line.partition(" | ")
            offset, _, _, words, *rest = data.split()
            self.glosses[int(offset)] = gloss.strip()
            pointers = rest[2 * int(words, 16) :]
            pairs = zip(pointers[1::4], pointers[2::4], strict=True)
            self._above[int(offset)] = [int(other) for symbol, other in pairs if symbol in ("@", "@i")]

    def above(self, synset: int) -> set[int]:
        """The synset and all that it is a kind of."""
        found, left = set(), [synset]
        while left:
            if (one := left.pop()) not in found:
                found.add(one)
                left += self._above[one]
        return found

    def is_kind(self, word: str, kind: str) -> bool:
        """Whether the most frequent sense of a word is a kind of the most frequent sense of another."""
        return word in self.senses and self.senses[kind][0] in self.above(self.senses[word][0])


def _lines(path: Path) -> list[str]:
    """Those that are not the licence, which is indented."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
