"""tools/make_emoji.py on small packages of the real format."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastkd.data.arrays import ArrayData
from fastkd.data.data import load_data
from fastkd.recipe.sections import ArraysData

from .image_trees import load_script

SCRIPT = load_script("make_emoji")

# Code points, Unicode's name, short name, subgroup.
EMOJI = [
    ("1F600", "GRINNING FACE", "grinning", "face-smiling"),
    ("1F601", "GRINNING FACE WITH SMILING EYES", "grin", "face-smiling"),
    ("1F426", "BIRD", "bird", "animal-bird"),
    ("1F427", "PENGUIN", "penguin", "animal-bird"),
    ("0031-FE0F-20E3", "KEYCAP 1", "one", "keycap"),
    ("1F468-200D-1F33E", "MAN FARMER", "male-farmer", "face-smiling"),
    ("1F1EA-1F1EC", "Egypt Flag", "flag-eg", "country-flag"),
    ("1F3FB", "EMOJI MODIFIER", "skin-tone-2", "skin-tone"),
]
NAMES = {
    "1f600": "grinning-face",
    "1f601": "beaming-face",
    "1f426": "bird",
    "1f427": "penguin",
    "1f468-200d-1f33e": "man-farmer",
    "1f1ea-1f1ec": "flag-egypt",
    "31-20e3": "keycap-1",
}


def pack(folder: Path, package: Any, **files: Any) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / package.file, "w:gz") as archive:
        for name, value in files.items():
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def body(number: int, size: int) -> str:
    """The left half in a colour of its own, the right half cyan."""
    half = size / 2
    return (
        f'<path fill="#{40 + number:02x}0000" d="M0 0h{half}v{size}H0z"/>'
        f'<path fill="#00ffff" d="M{half} 0h{half}v{size}H{half}z"/>'
    )


def make_packages(folder: Path) -> Path:
    entries = [
        {
            "unified": code,
            "name": name,
            "short_names": [short],
            "category": "Any",
            "subcategory": group,
            "sort_order": order,
        }
        for order, (code, name, short, group) in enumerate(EMOJI)
    ]
    pack(folder, SCRIPT.CHARACTERS, emoji=entries)
    for number, package in enumerate(SCRIPT.SETS):
        size = (128, 64)[number % 2]
        listed = package.name in ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
        names = {code: name for code, name in NAMES.items() if listed or code != "31-20e3"}
        icons = {name: {"body": body(16 * number + i, size)} for i, name in enumerate(names.values())}
        aliases: dict[str, Any] = {"penguin-mirrored": {"parent": "penguin", "hFlip": True}}
        if package.name == "fxemoji":  # names of Unicode, run together
            icons = {"grinningface": icons["grinning-face"], "grin": icons["beaming-face"]}
        if package.name == "emojione-v1":
            icons["penguin"]["body"] = "<g></g>"  # blank
            icons["birdie"] = icons.pop("bird")
            aliases["bird"] = {"parent": "birdie"}
        pack(
            folder,
            package,
            icons={"icons": icons, "aliases": aliases, "width": size, "height": size},
            info={
                "author": {"name": f"Artist {number}", "url": "https://example.org/a"},
                "license": {"title": package.licence, "url": "https://example.org/l"},
            },
            chars=names if listed else {},
        )
    return folder


def run(folder: Path, packages: Path, *options: str) -> int:
    status: int = SCRIPT.main([str(folder), "--packages", str(packages), "--min-characters", "2", *options])
    return status


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_a_data_set_that_the_trainer_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py", reason="resvg-py, which renders the pictures, is not installed")
    packages = make_packages(tmp_path / "packages")
    assert run(tmp_path / "emoji", packages) == 0
    out = capsys.readouterr().out
    # 8 sets with 4 characters of the 2 classes: one drew 2 of them, one left one blank.
    assert "2 classes, 29 training pictures, 4 to validate" in out
    assert "left out, blank or no SVG: 1 (emojione-v1/penguin)" in out
    train, test = (read(tmp_path / "emoji" / f"{part}.npz") for part in ("train", "test"))
    assert train["classes"].tolist() == ["Any: face-smiling", "Any: animal-bird"]
    assert test["character"].tolist() == ["1f600", "1f601", "1f426", "1f427"]
    assert test["target"].tolist() == [0, 0, 1, 1]
    assert {"noto", "noto-v1", "fxemoji"} < set(train["source"])
    assert set(test["source"]) == {"twemoji"}
    assert train["character"][train["source"] == "fxemoji"].tolist() == ["1f600", "1f601"]
    assert train["character"][train["source"] == "emojione-v1"].tolist() == ["1f600", "1f601", "1f426"]
    # Whole pictures, neither cropped nor mirrored: red from 40 on the left, cyan on the right.
    assert (test["images"][:, :, :, 16:] == np.array([0, 255, 255])[:, None, None]).all()
    assert (test["images"][:, 0, :, :16] == (72 + np.arange(4))[:, None, None]).all()
    data = load_data(ArraysData(name="arrays", folder=str(tmp_path / "emoji")))
    assert isinstance(data, ArrayData)
    assert (data.num_classes, data.samples, data.kind.padding) == (2, 29, 4)
    text = (tmp_path / "emoji" / "SOURCES.md").read_text()
    assert all(f"| {package.name} | {package.spec.split('@')[2]} |" in text for package in SCRIPT.SETS)
    assert "[CC-BY-SA-4.0](https://example.org/l) | https://example.org/a | 4 | 0 |" in text

    assert run(tmp_path / "again", packages) == 0
    for path in (tmp_path / "emoji").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert run(tmp_path / "google", packages, "--holdout=google", "--exclude=twitter,openmoji") == 0
    assert set(read(tmp_path / "google" / "test.npz")["source"]) == {"noto", "noto-v1"}
    assert not {"twemoji", "openmoji"} & set(read(tmp_path / "google" / "train.npz")["source"])
    capsys.readouterr()
    before = (tmp_path / "emoji" / "train.npz").stat().st_mtime_ns
    assert run(tmp_path / "emoji", packages, "--size=8") == 2
    assert f"{tmp_path / 'emoji'} exists; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "emoji" / "train.npz").stat().st_mtime_ns == before


def test_classes_have_enough_characters_and_no_flags(tmp_path: Path) -> None:
    path = make_packages(tmp_path) / SCRIPT.CHARACTERS.file
    emoji = SCRIPT.read_json(path, "emoji.json")
    classes = SCRIPT.classes_of(emoji, 1)
    assert list(classes) == ["1f600", "1f601", "1f426", "1f427", "31-20e3"]
    assert set(SCRIPT.classes_of(emoji, 2).values()) == {"Any: face-smiling", "Any: animal-bird"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--holdout=noto"], "--holdout = noto: no such artist; expected some of google, twitter"),
        (["--exclude=apple"], "--exclude = apple: no such artist"),
        (["--exclude=twitter"], "twitter: given to both"),
        (["--holdout="], "at least one artist to hold out"),
        ([f"--holdout={','.join(SCRIPT.ARTISTS)}"], "and one to train on"),
        (["--size=0"], "--size from 8 to 512"),
    ],
)
def test_bad_options(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "emoji", tmp_path / "packages", *options) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_packages_that_cannot_be_fetched_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SCRIPT.SETS[0]
    assert package.file == "iconify-json-noto-1.2.9.tgz"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SCRIPT.EmojiError, match=r"npm, which fetches @iconify-json/noto@1\.2\.9, is not"):
        SCRIPT.fetch(package, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(SCRIPT.EmojiError, match=r"^npm pack .* failed: no network$"):
        SCRIPT.fetch(package, tmp_path)
    npm.write_text(f"#!/bin/sh\necho x > {package.file}\n")
    path = SCRIPT.fetch(package, tmp_path)
    npm.unlink()
    assert SCRIPT.fetch(package, tmp_path) == path  # there already
    with pytest.raises(SCRIPT.EmojiError, match=r"icons\.json cannot be read .*; delete the file"):
        SCRIPT.read_json(path, "icons.json")
    os.truncate(make_packages(tmp_path) / package.file, 300)
    with pytest.raises(SCRIPT.EmojiError, match=r"icons\.json cannot be read"):
        SCRIPT.read_json(path, "icons.json")
