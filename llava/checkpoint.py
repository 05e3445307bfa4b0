"""Between the original LLaVA-1.5 files and transformers' folders: base models and adapters, in both directions.

    python -m llava.checkpoint assemble --llm vicuna --vision clip --projector mm_projector.bin --out DIR
    python -m llava.checkpoint assemble --llm LLAVA_FOLDER --vision clip --out DIR      a whole LLaVA checkpoint
    python -m llava.checkpoint assemble --llm LLAVA_HF_FOLDER --out DIR                 an export of llava-hf
    python -m llava.checkpoint disassemble --from DIR --out DIR                         llm/, vision/, mm_projector.bin
    python -m llava.checkpoint import-adapter --from LLAVA_LORA_FOLDER --out DIR [--base DIR]
    python -m llava.checkpoint export-adapter --from DIR --out DIR [--base DIR]
    python -m llava.checkpoint merge --base DIR --adapter DIR --out DIR

What assemble and merge write of LLaVA-1.5 is a plain folder for the classes of transformers 5 and 4.57, with the prompt
of training as its chat template; merge writes other families as transformers saves them. Tensors keep their bits and,
unless --dtype says otherwise, their dtypes; what merge adds up, it adds up in float32 and rounds once. A folder is
written whole or not at all.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch

from llava.backbones import family_of
from llava.files import whole_folder
from llava.original.adapter import export_adapter_folder, import_adapter_folder
from llava.original.base import disassemble, read_base, write_base


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="llava.checkpoint", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    flags = {
        "assemble": ("--llm", "--vision?", "--projector?", "--out", "--dtype?"),
        "disassemble": ("--from", "--out"),
        "import-adapter": ("--from", "--out", "--base?"),
        "export-adapter": ("--from", "--out", "--base?"),
        "merge": ("--base", "--adapter", "--out", "--dtype?"),
    }
    for command, names in flags.items():
        sub = commands.add_parser(command)
        for name in names:
            choices = ["float32", "bfloat16", "float16"] if "dtype" in name else None
            sub.add_argument(name.rstrip("?"), required=not name.endswith("?"), choices=choices)
    given = vars(parser.parse_args())
    dtype = getattr(torch, given["dtype"]) if given.get("dtype") else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("llava.checkpoint: stopped"))  # what is half written goes
    try:
        sources = [
            Path(value).resolve() for key, value in given.items() if value and key not in ("command", "dtype", "out")
        ]
        if Path(given["out"]).resolve() in sources:
            raise ValueError(f"--out {given['out']} is what is read; choose another folder")
        with whole_folder(given["out"]) as out:
            if given["command"] == "assemble":
                write_base(read_base(given["llm"], given["vision"], given["projector"]), out, dtype)
            elif given["command"] == "merge":
                family_of(given["base"]).merge(given["base"], given["adapter"], out, dtype)
            elif given["command"] == "disassemble":
                disassemble(given["from"], out)
            else:
                turn = import_adapter_folder if given["command"] == "import-adapter" else export_adapter_folder
                turn(given["from"], out, given["base"])
    except (ValueError, OSError) as error:
        sys.exit(f"llava.checkpoint: {' '.join(str(error).split())}")
    except Exception as error:  # of a library, from settings that it took and cannot use
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(
            f"llava.checkpoint: {', '.join(map(str, sources))} cannot be used ({reason}); check the configurations"
        )
    print(f"{given['out']}: written")


if __name__ == "__main__":
    main()
