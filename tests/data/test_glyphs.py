from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.subset import Subsetter
from fontTools.ttLib import TTCollection, TTFont

from fastkd.data.glyphs import render
from fastkd.data.glyphs.fonts import DEJAVU_HOLDOUT, parse_characters, split_faces
from fastkd.data.glyphs.loader import GlyphLoader, augment_batch, load_glyph_data
from fastkd.data.glyphs.render import load_glyphs, render_face
from fastkd.errors import DataError
from fastkd.recipe.sections import GlyphsData
from tests.small_fonts import DEJAVU

CPU = torch.device("cpu")
LETTERS = "41-5A,61-7A"


def test_the_default_set() -> None:
    data = load_glyph_data(GlyphsData())
    assert len(data.glyphs.faces) == 12
    assert len(data.train_faces) == 9
    assert {data.glyphs.faces[i] for i in data.val_faces} == set(DEJAVU_HOLDOUT)
    # Exact counts depend on the versions of the fonts and of FreeType.
    assert 2200 < data.num_classes < 2383
    assert data.images.shape == (12, data.num_classes, 32, 32)
    points = [point for members in data.glyphs.classes for point in members]
    assert len(points) == len(set(points))
    assert any(len(members) > 1 for members in data.glyphs.classes)
    assert [ord("A"), 0x391] not in data.glyphs.classes or [ord("A")] not in data.glyphs.classes
    columns = {data.images[:, j].tobytes() for j in range(data.num_classes)}
    assert len(columns) == data.num_classes, "two classes have identical images"
    assert data.images.any(axis=(2, 3)).all(), "a class is blank in some face"


def test_images_are_the_glyphs(fonts: Path) -> None:
    glyphs, images = load_glyphs(str(fonts), LETTERS, 1.0)
    sans = glyphs.faces.index("DejaVu Sans Book")
    j = glyphs.classes.index([ord("T")])
    image = images[sans, j]
    # A T: a wide bar at the top, a stem below its middle, nothing under the baseline.
    top = int(np.argmax(image.any(axis=1)))
    assert (image[top + 1] > 128).sum() >= 14
    stem = image[20]
    assert 1 <= (stem > 128).sum() <= 4
    assert 14 <= np.average(np.arange(32), weights=stem) <= 17
    assert not image[24:].any()


def test_characters_with_identical_images_are_one_class(fonts: Path) -> None:
    glyphs, _ = load_glyphs(str(fonts), "41-5A,391-3A1", 1.0)
    assert [ord("A"), 0x391] in glyphs.classes  # Latin A and Greek capital alpha


def test_the_cache_is_used_and_mended(fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path))
    first, images = load_glyphs(str(fonts), LETTERS, 1.0)
    expected = np.array(images)
    (folder,) = tmp_path.glob("glyphs-*")
    file = folder / "images.npy"

    with monkeypatch.context() as patched:
        patched.setattr(render, "_render_into", None)  # a call would raise
        again, images = load_glyphs(str(fonts), LETTERS, 1.0)
        assert again == first
        assert np.array_equal(images, expected)

    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 0xFF
    for damage in (whole[: len(whole) // 2], bytes(flipped), b""):
        del images
        file.write_bytes(damage)
        mended, images = load_glyphs(str(fonts), LETTERS, 1.0)
        assert mended == first
        assert np.array_equal(images, expected)
    (folder / "glyphs.json").write_text("{")
    assert load_glyphs(str(fonts), LETTERS, 1.0)[0] == first
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "something temporary was left"


def test_other_fonts_or_settings_are_another_cache(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "fonts"
    shutil.copytree(fonts, folder)
    digests = {load_glyphs(str(folder), LETTERS, 1.0)[0].digest}
    digests.add(load_glyphs(str(folder), "41-5A", 1.0)[0].digest)
    shutil.copy(DEJAVU / "DejaVuSans-Oblique.ttf", folder / "DejaVuSans.ttf")  # same name, other content
    digests.add(load_glyphs(str(folder), LETTERS, 1.0)[0].digest)
    assert len(digests) == 3


def test_collections_duplicates_and_damaged_files(tmp_path: Path) -> None:
    collection = TTCollection()
    collection.fonts = [TTFont(DEJAVU / f"{name}.ttf") for name in ("DejaVuSans", "DejaVuSerif")]
    collection.save(tmp_path / "two.ttc")
    shutil.copy(DEJAVU / "DejaVuSansMono.ttf", tmp_path / "mono.TTF")
    shutil.copy(DEJAVU / "DejaVuSansMono.ttf", tmp_path / "copy.ttf")
    # The same outlines in a different file: a face that adds nothing.
    shutil.copy(DEJAVU / "DejaVuSerif.ttf", tmp_path / "serif.ttf")
    (tmp_path / "broken.otf").write_bytes((DEJAVU / "DejaVuSans.ttf").read_bytes()[:5000])
    (tmp_path / "text.ttf").write_text("no font")
    glyphs, images = load_glyphs(str(tmp_path), LETTERS, 1.0)
    assert sorted(glyphs.files) == ["copy.ttf", "serif.ttf", "two.ttc"]
    assert len(images) == 3
    notes = "\n".join(glyphs.notes)
    assert "broken.otf" in notes
    assert "text.ttf" in notes
    assert "identical" in notes


def test_a_face_without_the_wanted_characters_is_left_out(tmp_path: Path) -> None:
    for name in ("DejaVuSans", "DejaVuSerif", "cmr10"):
        shutil.copy(DEJAVU / f"{name}.ttf", tmp_path)
    glyphs, _ = load_glyphs(str(tmp_path), "400-45F", 0.95)  # Cyrillic
    assert glyphs.files == ["DejaVuSans.ttf", "DejaVuSerif.ttf"]
    assert "cmr10" in "".join(glyphs.notes)


def test_font_folders_that_cannot_be_used(tmp_path: Path, fonts: Path) -> None:
    def refused(folder: Path, characters: str | None = None, holdout: list[str] | None = None) -> str:
        with pytest.raises(DataError) as raised:
            load_glyph_data(GlyphsData(fonts=str(folder), characters=characters, holdout=holdout))
        return str(raised.value)

    missing = tmp_path / "missing"
    assert f"{missing} does not exist; expected a folder" in refused(missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds no readable TTF" in refused(empty)
    (empty / "a.ttf").write_text("no font")
    assert "a.ttf" in refused(empty)
    assert f"{empty} holds no usable font" in refused(empty)
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(DEJAVU / "DejaVuSans.ttf", one)
    assert "at least two are needed" in refused(one, LETTERS)
    assert "characters in common" in refused(fonts, "41-43")
    assert "that data.coverage asks for" in refused(fonts, "4E00-9FA5")
    assert "no face 'Comic'" in refused(fonts, LETTERS, ["Comic"])
    assert "data.characters" in refused(fonts, "xyz")
    few = tmp_path / "few"
    shutil.copytree(fonts, few)
    font = TTFont(DEJAVU / "DejaVuSans-Oblique.ttf")
    subsetter = Subsetter()
    subsetter.populate(text="abc")
    subsetter.subset(font)
    font.save(few / "abc.ttf")
    text = refused(few)
    assert "have 3 visible characters in common" in text
    assert "DejaVu Sans Oblique (3)" in text


def test_parse_characters() -> None:
    assert parse_characters("41-43, U+61") == [0x41, 0x42, 0x43, 0x61]
    assert len(parse_characters("4E00-9FA5")) == 20902
    for bad in ("", "5A-41", "110000", "41-", "g"):
        with pytest.raises(DataError, match=r"data\.characters"):
            parse_characters(bad)


def test_the_split_keeps_files_together() -> None:
    names = [f"face {i}" for i in range(12)]
    files = [f"{'abcdef'[i // 2]}.ttc" for i in range(12)]
    train, val = split_faces(names, files, None)
    assert {files[i] for i in val} == {"d.ttc"}
    assert sorted(train + val) == list(range(12))
    assert split_faces(names[:4], files[:4], None) == ([0, 1], [2, 3])
    assert split_faces(names[:8], ["a.ttc"] * 8, None) == ([0, 1, 2, 4, 5, 6], [3, 7])
    assert split_faces(names[:3], files[:3], ["face 1"]) == ([0, 2], [1])


@pytest.fixture
def images(fonts: Path) -> np.ndarray:
    return load_glyphs(str(fonts), LETTERS, 1.0)[1]


def test_the_loader_yields_every_image_once(images: np.ndarray) -> None:
    faces = [3, 1]
    for loader in (
        GlyphLoader(images, faces, 7, device=CPU),
        GlyphLoader(images, faces, 7, device=CPU, seed=0),
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        got = torch.cat([x for x, _ in batches])
        target = torch.cat([y for _, y in batches])
        assert got.dtype == torch.float32
        assert target.dtype == torch.int64
        assert got.shape == (2 * images.shape[1], 1, 32, 32)
        assert torch.bincount(target).tolist() == [2] * images.shape[1]
        expected = {images[f, c].tobytes() + bytes([c]) for f in faces for c in range(images.shape[1])}
        seen = {
            (x * 255).round().to(torch.uint8).numpy().tobytes() + bytes([int(y)])
            for x, y in zip(got, target, strict=True)
        }
        assert seen == expected


def test_an_epoch_of_a_seed_is_always_the_same(images: np.ndarray) -> None:
    def epoch(seed: int, number: int) -> torch.Tensor:
        loader = GlyphLoader(images, [0, 1], 16, device=CPU, seed=seed, augment=1.0)
        loader.set_epoch(number)
        return torch.cat([x for x, _ in loader])

    before = torch.get_rng_state()
    first = epoch(1, 2)
    assert torch.equal(before, torch.get_rng_state()), "the loader drew from the global generator"
    assert torch.equal(first, epoch(1, 2))
    assert not torch.equal(first, epoch(1, 3))
    assert not torch.equal(first, epoch(2, 2))


def test_any_rank_and_position_sees_the_images_of_the_whole_epoch(images: np.ndarray) -> None:
    loader = GlyphLoader(images, [0, 1], 16, device=CPU, seed=1, augment=1.0)
    whole = list(loader.indexed())
    classes = images.shape[1]
    assert sorted(torch.cat([chosen for *_, chosen in whole]).tolist()) == list(range(2 * classes))
    assert all(torch.equal(target, chosen % classes) for _, target, chosen in whole)
    for rank in range(2):
        for expected, got in zip(whole[3:], loader.indexed(3, rank, 2), strict=True):
            half = slice(rank * len(expected[0]) // 2, (rank + 1) * len(expected[0]) // 2)
            assert all(torch.equal(a[half], b) for a, b in zip(expected, got, strict=True))


def test_augmentation_is_small_and_differs_by_image(images: np.ndarray) -> None:
    one = torch.from_numpy(np.array(images[0, 7])).float().div(255)
    batch = one.expand(64, 1, 32, 32)
    assert torch.allclose(augment_batch(batch, 0.0, torch.Generator()), batch, atol=1e-5)
    augmented = augment_batch(batch, 1.0, torch.Generator().manual_seed(0))
    assert len({x.numpy().tobytes() for x in augmented}) == 64
    ink = augmented.sum(dim=(1, 2, 3)) / one.sum()
    assert 0.7 < ink.min() < ink.max() < 1.4
    # The centre of mass stays within shift, rotation and noise.
    grid = torch.arange(32.0)
    weights = augmented.clamp_min(0.25).sub(0.25).squeeze(1)
    centre = (weights.sum(1) * grid).sum(1) / weights.sum((1, 2))
    still = (one.sum(0) * grid).sum() / one.sum()
    assert 0.5 < (centre - still).abs().max() < 5


def test_rendering_in_processes_is_the_same(fonts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.data.glyphs.fonts import Face

    points = parse_characters(LETTERS)
    faces = [Face(path, 0, path.stem, frozenset()) for path in sorted(fonts.glob("*.ttf"))]
    monkeypatch.setattr(render, "_GLYPHS_WORTH_A_POOL", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pooled = list(render._render_faces(faces, points))
    for face, got in zip(faces, pooled, strict=True):
        assert np.array_equal(got, render_face(str(face.path), 0, points))


def test_excluded_faces_neither_train_nor_validate() -> None:
    names, files = ["a", "b", "c", "d"], ["1", "1", "2", "3"]
    assert split_faces(names, files, ["b"], ["c"]) == ([0, 3], [1])
    assert split_faces(names, files, None, ["a", "b"]) == ([2], [3])
    with pytest.raises(DataError, match=r"data\.exclude: no face 'x'"):
        split_faces(names, files, None, ["x"])
    with pytest.raises(DataError, match=r"data\.exclude leaves 1 of 4 faces"):
        split_faces(names, files, None, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"data\.holdout: no face 'a'; there are b, c, d"):
        split_faces(names, files, ["a"], ["a"])
    data = load_glyph_data(GlyphsData(holdout=["DejaVu Serif Bold"], exclude=list(DEJAVU_HOLDOUT)))
    assert (len(data.train_faces), len(data.val_faces)) == (8, 1)
