"""How a page of eval/pages becomes one file that fetches nothing: its templates, styles, scripts and data in it."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.cache import cache_folder, make_once

PAGES = Path(__file__).with_name("pages")
# A page may run its own scripts (Vega compiles expressions) and nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"


def library() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as a script that sets `vegaEmbed`; bundled once (two seconds) and kept."""
    from vl_convert import __version__, javascript_bundle

    def bundle(file: Path, partial: Path) -> None:
        code = javascript_bundle("window.vegaEmbed = vegaEmbed;")
        partial.write_text(code.replace("</script", "<\\/script"), encoding="utf-8")

    file = cache_folder() / "pages" / f"vega-{__version__}.js"
    make_once([file], bundle)
    return Markup(file.read_text(encoding="utf-8"))


def part(*names: str) -> Markup:
    """Files of eval/pages, one after the other."""
    return Markup("\n".join((PAGES / name).read_text(encoding="utf-8") for name in names))


def embedded(content: Any) -> Markup:
    """JSON for a script element: what could end it, or start markup, is escaped."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def rendered(template: str, **content: Any) -> str:
    """A page of eval/pages."""
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return pages.get_template(template).render(
        policy=Markup(POLICY), style=part("page.css"), library=library(), **content
    )
