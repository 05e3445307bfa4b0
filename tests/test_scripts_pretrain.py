"""Pre-training of the small bases: broken off and typed again it ends in the same bytes."""

import sys

import pytest

from scripts import pretrain_tiny, tiny_t5


class Broken(Exception):
    """The process ends."""


@pytest.mark.parametrize("last", [3, 6])  # inside the first phase, and inside the second
def test_broken_off_and_typed_again_gives_the_same_bytes(tmp_path, monkeypatch, capsys, last):
    monkeypatch.setattr(pretrain_tiny, "EVERY", 2)

    def pretrain(name: str, *more: str) -> None:
        line = ["--family", "t5", "--steps", "4", "3", "--no-bf16", "--out", str(tmp_path / name), *more]
        monkeypatch.setattr(sys, "argv", ["pretrain", *line])
        pretrain_tiny.main()

    pretrain("whole")
    drawn, draw = [], tiny_t5.Batches.draw

    def fall(batches, name):
        drawn.append(name)
        if len(drawn) > last:
            raise Broken
        return draw(batches, name)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_t5.Batches, "draw", fall)
        with pytest.raises(Broken):
            pretrain("broken")
    with pytest.raises(SystemExit, match=r"progress\.pt was begun with .* remove it to begin anew"):
        pretrain("broken", "--seed", "1")
    pretrain("broken")
    assert f"goes on in phase {('denoise', 'first')[last > 4]} after step 2" in capsys.readouterr().out
    folders = [tmp_path / name for name in ("whole", "broken")]
    whole, broken = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert broken == whole and "progress.pt" not in whole
    pretrain("whole", "--seed", "1")
    assert "whole: already there; remove it to make it anew" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == whole


def test_a_second_phase_broken_off_is_not_a_model(tmp_path, monkeypatch):
    def pretrain(name: str, *more: str) -> None:
        line = ["--family", "t5", "--no-bf16", "--out", str(tmp_path / name), "--steps", "2", *more]
        monkeypatch.setattr(sys, "argv", ["pretrain", *line])
        pretrain_tiny.main()

    pretrain("start", "--phases", "denoise")
    second = ("--phases", "first", "--start-from", str(tmp_path / "start"))
    pretrain("whole", *second)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(tiny_t5.Batches, "draw", lambda batches, name: (_ for _ in ()).throw(Broken))
        pretrain("broken", *second)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    pretrain("broken", *second)
    whole, broken = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "broken")
    )
    assert broken == whole
