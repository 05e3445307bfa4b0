"""Files of a model folder: read, or refused in one sentence that names the file, what it is and the remedy.

A clone without Git LFS, an interrupted download and a page that a server sent in a file's place all leave files of the
right names. The libraries that open them raise errors of their parsers, most of them without a name.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
JSON_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # the last is T5's


def check_file(path: str | Path) -> None:
    """Check that a file is there and is itself.

    Raises FileNotFoundError, or ValueError for an empty file, a pointer of Git LFS, a web page and, of weights
    (safetensors, or an archive of torch.save), a file of another length than its own table of contents says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} complete?")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise ValueError(f"{path} is empty; download it again")
    if head.startswith(LFS_POINTER):
        real = re.search(rb"size (\d+)", head)
        raise ValueError(
            f"{path} is a Git LFS pointer of {size} bytes in place of the file"
            f"{f' of {int(real[1])} bytes' if real else ''}; run `git lfs pull` in its repository, or download it"
        )
    if head.lstrip().lower().startswith(WEB_PAGE):
        raise ValueError(f"{path} is a web page, which a server sent in place of the file; download it again")
    if path.suffix == ".safetensors":
        _check_safetensors(path, size)
    elif head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut off: its {size} bytes have no end of an archive; download it again")


def read_object(path: str | Path) -> dict:
    """Return the object in a JSON file. Raises what `check_file` raises, and ValueError naming the file."""
    path = Path(path)
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except json.JSONDecodeError as error:
        short = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = f"is cut off after {path.stat().st_size} bytes" if short else f"is not JSON ({error})"
        raise ValueError(f"{path} {what}; download it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON, nor any text in UTF-8; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(content).__name__}; download it again")
    return content


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, safetensors or pickle. Pickles may hold tensors by name and nothing else.

    Raises what `check_file` raises, and ValueError naming the file if it holds anything but tensors (nothing of it has
    been executed then) or numbers that are not finite, whose tensors are listed.
    """
    path = Path(path)
    check_file(path)
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something else than tensors, or is no file of weights; it was not opened any further. "
            f"Save the tensors alone, with torch.save or as safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: cut off or damaged; download it again ({reason})") from error
    strange = not isinstance(state, dict) or [k for k, v in state.items() if not isinstance(v, torch.Tensor)]
    if strange:
        raise ValueError(
            f"{path} should hold tensors by name; it has {strange if strange is not True else type(state)}"
        )
    check_finite(path, state)
    return state


def check_finite(source: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError listing the tensors of `source` that hold NaN or infinity."""
    broken = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(
            f"{source} holds NaN or infinity in {', '.join(broken[:10])}{more}; take a file from before it broke"
        )


def check_same(source: str, wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Raise ValueError listing missing, unexpected and misshapen tensors of `given`, which comes from `source`."""
    faults = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "shape": sorted(name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape),
    }
    if any(faults.values()):
        raise ValueError(
            f"{source} does not fit the model: { {kind: names for kind, names in faults.items() if names} }"
        )


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files that hold a folder's weights. Raises FileNotFoundError if there are none, or a shard misses."""
    folder = Path(folder)
    for index in INDICES:
        if (folder / index).is_file():
            shards = read_object(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(n, str) for n in shards.values()):
                raise ValueError(f"{folder / index} has no weight_map of tensors and files; download it again")
            files = [folder / name for name in sorted(set(shards.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{folder / index} names {missing}, which are not there; download them")
            return files
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(f"{folder} holds neither {' nor '.join(WEIGHT_PATTERNS)}")


def check_tokenizer(folder: str | Path) -> None:
    """Check the tokenizer's files and the other small ones of a folder. Raises what `check_file` raises, by file."""
    folder = Path(folder)
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name)
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; is it complete? checkpoints/README.md says how "
            "a base is made or fetched"
        )
    for name in found:
        _check_vocabulary(folder / name)


def make_config(kind: type, content: dict, file: Path):
    """Return a configuration of transformers' class `kind`, from the object in `file`.

    Raises ValueError naming the file; transformers raises errors of many classes, none of which does.
    """
    if parts := [key for key in ("text_config", "vision_config") if not isinstance(content.get(key, {}), dict)]:
        raise ValueError(f"{file}: {' and '.join(parts)} should hold an object; download it again")
    try:
        return kind.from_dict(content)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not what transformers' {kind.__name__} takes ({reason}); correct it") from error


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `out`. What was written there moves to `out` at the end, and is removed on an error.

    Weights move last, so that a folder that holds them is complete. Whom the umask lets read the folder may read every
    file in it, also those of safetensors, which makes them for their owner alone. Raises ValueError if `out` is a file
    or holds weights already: two generations of shards would mix.
    """
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write")
    if old := sorted(file for file in out.rglob("*") if _is_weights(file)):
        raise ValueError(f"{out} holds weights already ({old[0].name}); remove it or give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.mkdir()
    readable = draft.stat().st_mode & 0o666
    try:
        yield draft
        for file in sorted((file for file in draft.rglob("*") if file.is_file()), key=_is_weights):
            place = out / file.relative_to(draft)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(readable)
            file.replace(place)
    finally:
        shutil.rmtree(draft)


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


def _check_safetensors(path: Path, size: int) -> None:
    """A safetensors file begins with the length of its table of contents, in 8 bytes, and the table, in JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = file.read(1)
        if size < 8 or begin not in (b"{", b""):
            raise ValueError(f"{path} is no safetensors file; download it again")
        if size < 8 + length:
            raise ValueError(f"{path} is cut off: it has {size} bytes, its table alone {8 + length}; download it again")
        try:
            table = json.loads(begin + file.read(length - 1))
            ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged table of contents; download it again") from error
    if size != whole:
        state = "is cut off" if size < whole else "has something behind its tensors"
        raise ValueError(f"{path} {state}: it has {size} bytes, not {whole}; download it again")


def _check_vocabulary(path: Path) -> None:
    check_file(path)
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        read_object(path)
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises this class itself
            raise ValueError(f"{path} is no tokenizer ({error}); download it again") from error
    else:
        from sentencepiece import SentencePieceProcessor

        try:
            SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} is no sentencepiece model, or cut off after {path.stat().st_size} bytes; download it again"
            ) from error
