"""JSON files as people have them: a list, an object, JSON lines; whatever else a file is, is named with its remedy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs"
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; the objects of a JSON-lines file come as a list. A byte-order mark is read over.

    Raises ValueError naming the file, what it is instead, and the remedy; FileNotFoundError where there is none.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} cannot be read: no such file; check data_root and benchmark.yaml") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check data_root and benchmark.yaml") from error
    return parse(content, path)


def parse(content: bytes, path: Path) -> Any:
    """Return what the bytes of the JSON file `path` say. Raises ValueError as `read_json` does."""
    if content.startswith(LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if encoding := ENCODINGS.get(content[:2]):
        raise ValueError(f"{path} is {encoding} text; save it as UTF-8 (iconv -f {encoding} -t UTF-8)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text from line {line} on; save it as UTF-8 (iconv -f GB18030 -t UTF-8, for Chinese)"
        ) from error
    if text.lstrip()[:1] == "<":
        raise ValueError(f"{path} is a web page, not JSON; download the file itself again")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and (lines := _json_lines(text)) is not None:
            return lines
        where = f"line {error.lineno}, column {error.colno}"
        cut = "; it ends there, so it may be cut short" if error.pos >= len(text.rstrip()) else ""
        raise ValueError(f"{path}: not JSON: {error.msg} at {where}{cut}; correct that line") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not records: its values are nested too deeply; correct the file") from error


def _json_lines(text: str) -> list | None:
    """Return the values of the lines, None unless each line is an object."""
    try:
        values = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError:
        return None
    return values if all(isinstance(value, dict) for value in values) else None


def read_json_of(path: str | Path, kind: type) -> Any:
    """Return what a JSON file holds, whose top level must be a `kind` (list or dict) with at least one entry.

    Raises FileNotFoundError or ValueError naming the file, as `read_json` does.
    """
    content = read_json(path)
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path}: expected a JSON {kind.__name__} with at least one entry")
    return content


def field(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `record[key]`, which must be there and be a `kind`; `where` names file and record in the ValueError.

    True and false are no numbers here.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: '{key}' is missing or of the wrong type; correct the record")
    return value


def one_of(value: str, known: Mapping[str, Any] | Sequence[str], what: str) -> str:
    """Return `value`, which must be one of `known`; ValueError listing them otherwise."""
    if value not in known:
        raise ValueError(f"{what} '{value}' is not known; choose one of {', '.join(known)}")
    return value
