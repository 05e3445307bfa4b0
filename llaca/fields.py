"""The values of a recipe: each is read as the type that its field declares, or refused in one sentence.

YAML guesses at types (`1e-4` is a text, `2024` a number, `no` a truth value, `007` is 7). What a field means is known
better here, so a recipe is read as text, and the field's declared type says what the text is.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, field
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def setting(default: Any, text: str, **limits: float) -> Any:
    """A field of a recipe or of a method's Settings, for a dataclass.

    default: its value where none is given; MISSING: one has to be given; list, dict: an empty one. text: what --help
    says of it. limits: of a number, `least` and `most` with that value, `above` and `below` without it.
    """
    metadata = {"help": text, "limits": limits}
    if default in (list, dict):
        return field(default_factory=default, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


class TextLoader(yaml.SafeLoader):
    """YAML whose plain values stay text, but for empty ones (None)."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self):
        """The document. Raises ConstructorError for a key that stands twice in one mapping."""
        document = super().get_single_node()
        waiting, met = [document], set()
        while waiting:
            node = waiting.pop()
            if id(node) in met or not isinstance(node, yaml.CollectionNode):
                continue
            met.add(id(node))
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
            for number, key in enumerate(keys):
                if key.value in {earlier.value for earlier in keys[:number]}:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            waiting += [value for _, value in pairs] if pairs else node.value
        return document


def read_text(path: Path) -> dict[str, Any]:
    """A YAML file as {key: text, None, list or mapping}. Raises ValueError naming the file and, if known, the line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    return mapping("the file", {} if content is None else content, f"{path}: ")


def mapping(name: str, value: Any, where: str = "") -> dict[str, Any]:
    """`value`, if it is a mapping. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}{name}: {shown(value)} is not a mapping, as {{key: value}}")
    return dict(value)


def shown(value: Any) -> str:
    """A value in a message."""
    return "an empty value" if value is None else repr(value)


def declared(field: Field) -> Any:
    """The type of a field without None: HfArgumentParser takes the None out of the class itself, sooner or later."""
    if get_origin(field.type) in (Union, UnionType):
        (kind,) = (member for member in get_args(field.type) if member is not type(None))
        return kind
    return field.type


def value_of(field: Field, value: Any, where: str = "") -> Any:
    """`value`, a text or what it stands for, as the type of `field`.

    Raises ValueError naming `where` (a file, say), the field and what it takes.
    """
    kind = declared(field)
    if value is None and field.default is None:
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"{where}{field.name}: {shown(value)} is not known; choose one of {known}")
        return value
    found = _read(kind, value)
    fits = found is not None
    if fits and kind in (int, float):
        limits = field.metadata["limits"]
        fits = limits.get("least", -inf) <= found <= limits.get("most", inf)
        fits &= limits.get("above", -inf) < found < limits.get("below", inf)
    elif fits and kind is str:
        fits = bool(found.strip()) or field.default is not MISSING
    if not fits:
        raise ValueError(f"{where}{field.name}: {shown(value)} is not {expected(field)}")
    return found


def _read(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, None if it is none."""
    text = value.strip() if isinstance(value, str) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        return value if isinstance(value, bool) else TRUTH.get(text.lower()) if text else None
    if kind is int:
        if text is not None:
            return int(text) if re.fullmatch(r"[+-]?\d+(_\d+)*", text, re.ASCII) else None
        return value if type(value) is int else None
    if kind is float:
        try:
            number = float(value) if text is not None or type(value) in (int, float) else inf
        except (ValueError, OverflowError):
            return None
        return number if isfinite(number) else None
    if get_origin(kind) is list:
        return list(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    return dict(value) if isinstance(value, Mapping) else None


def expected(field: Field) -> str:
    """What a field takes, in words."""
    kind = declared(field)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is str:
        return "a text" if field.default is not MISSING else "a text; the field needs one"
    if kind is bool:
        return "true or false"
    if get_origin(kind) is list:
        return "a list of texts, as [a, b]"
    if kind is dict:
        return "a mapping, as {key: value}"
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    limits = [f"{words[name]} {value}" for name, value in field.metadata["limits"].items()]
    said = f" {' and '.join(limits)}" if limits else ""
    return ("a whole number" if kind is int else "a number") + said.replace(" at least", " of at least")
