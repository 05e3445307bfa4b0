"""What W&B 0.31 writes offline, which it has no Python reader for: Record messages in LevelDB's log format."""

import json
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024


def records(file: Path) -> Iterator[Record]:
    """Those of a run-ID.wandb: seven bytes of a head, then blocks of pieces (checksum 4, length 2, kind 1, content),
    of which kinds 1 and 4 end a message."""
    data, place, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # too little for a head
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def told(folder: Path) -> list[dict]:
    """Of every file in the order of their making: id, config, history (a dictionary a line) and summary."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        one = {"id": file.stem.removeprefix("run-"), "config": {}, "history": [], "summary": {}, "folder": file.parent}
        for record in records(file):
            for item in record.run.config.update:
                one["config"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                one["history"].append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            for item in record.summary.update:
                one["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        found.append(one)
    return found
