"""Checksums: right, remembered while the file is the same, and never in the way."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from data import checksums
from data.checksums import checksum


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that has not changed for a minute, with a cache of its own and nothing remembered in this process."""
    monkeypatch.setenv("LLACA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_memo", {})
    path = tmp_path / "weights.safetensors"
    write(path, b"weights")
    return path


def write(path, content, age=60.0):
    path.write_bytes(content)
    os.utime(path, (time.time() - age, time.time() - age))


def entries(file):
    return list((file.parent / "cache").rglob("*.json"))


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def read(monkeypatch):
    """How often a file's content was read."""
    seen, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: seen.append(given) or real(*given))
    return seen


def test_known_value(file):
    write(file, b"abc")  # FIPS 180-2, appendix B.1
    assert checksum(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_is_read_once_by_this_process_and_by_the_next(file, read, monkeypatch):
    link = file.with_name("link")
    link.symlink_to(file)
    assert checksum(file) == checksum(str(file)) == checksum(link) == digest(b"weights")
    assert len(read) == 1
    monkeypatch.setattr(checksums, "_memo", {})
    assert checksum(file) == digest(b"weights") and len(read) == 1
    (entry,) = entries(file)
    assert json.loads(entry.read_text())["sha256"] == digest(b"weights")


def test_a_file_that_changed_is_read_again(file, read):
    assert checksum(file) == digest(b"weights")
    write(file, b"WEIGHTS", age=50)  # the same size
    assert checksum(file) == digest(b"WEIGHTS")
    write(file, b"weights and more", age=50)  # the same time
    assert checksum(file) == digest(b"weights and more")
    assert len(read) == 3 and len(entries(file)) == 1


def test_a_file_that_changed_a_moment_ago_is_not_remembered(file):
    """It may change once more within the grain of the file system's clock."""
    now = time.time()
    for content in (b"weights", b"WEIGHTS"):
        file.write_bytes(content)
        os.utime(file, (now, now))
        assert checksum(file) == digest(content)
    assert not entries(file)


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[]", b"null", b'{"path": 1}', b'{"sha256": "0"}', b"\xff\xfe"],
)
def test_a_broken_memo_is_ignored_and_written_anew(file, monkeypatch, broken):
    checksum(file)
    (entry,) = entries(file)
    good = entry.read_bytes()
    entry.write_bytes(broken)
    monkeypatch.setattr(checksums, "_memo", {})
    assert checksum(file) == digest(b"weights")
    assert entry.read_bytes() == good


def test_a_memo_that_holds_no_checksum_is_not_believed(file, monkeypatch):
    checksum(file)
    (entry,) = entries(file)
    for wrong in (7, "short", None):
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": wrong}))
        monkeypatch.setattr(checksums, "_memo", {})
        assert checksum(file) == digest(b"weights")


def test_without_a_place_for_the_memo_the_checksum_is_right(file, monkeypatch):
    blocked = file.with_name("a-file")
    blocked.write_text("")
    for place in (blocked, "/proc/nowhere"):  # not even root can make a folder there
        monkeypatch.setenv("LLACA_CACHE", str(place))
        monkeypatch.setattr(checksums, "_memo", {})
        assert checksum(file) == digest(b"weights")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        checksum(tmp_path / "none.safetensors")


def test_processes_that_write_at_once_leave_whole_entries(file):
    """Each throws its memory away and writes the same entry again and again; none ever reads half a one."""
    script = (
        "import sys; from data import checksums\n"
        "for _ in range(300):\n"
        "    checksums._memo.clear()\n"
        "    checksums._write((sys.argv[1], 7, 1), 'a' * 64)\n"
        "    assert checksums._read((sys.argv[1], 7, 1)) == 'a' * 64\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(file)]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(entries(file)) == 1 and not list((file.parent / "cache").rglob("*.partial"))
