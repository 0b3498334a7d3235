"""Every mode that Pillow reads keeps its brightness; hidden folders and files are ignored."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data.files import load_file_data
from fastkd.data.pixels import decode, to_rgb
from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD, central_crop, random_crop
from fastkd.errors import DataError
from fastkd.recipe.sections import FolderData

from .image_trees import make_tree

# A ramp from black to white; 16 bits of it.
RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
WANTED = np.tile(np.linspace(0, 255, 64), (8, 1))
GREY = Image.fromarray(np.rint(WANTED).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def tiff(bits: int, photometric: int, order: str = "<") -> Image.Image:
    """Uncompressed, one strip; 12 bits are packed, two pixels in three bytes."""
    values = (RAMP if photometric else 65535 - RAMP) >> (16 - bits)
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = b"".join(int(value).to_bytes(3, "big") for value in packed)
    else:
        data = values.astype(f"{order}u2").tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1),
            (278, height), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    content = start + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    return Image.open(io.BytesIO(content.ljust(122, b"\0") + data))


def palette() -> Image.Image:
    image = GREY.convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


def transparent(mode: str) -> Image.Image:
    image = GREY.convert(mode)
    image.putalpha(Image.fromarray(np.full((8, 64), 40, np.uint8)))
    return image


def cmyk() -> Image.Image:
    return Image.merge("CMYK", [Image.new("L", GREY.size, 0)] * 3 + [GREY.point(lambda v: 255 - v)])


def pgm(white: int) -> Image.Image:
    values = np.rint(RAMP / 65535 * white).astype(">u2" if white > 255 else "u1")
    return Image.open(io.BytesIO(b"P5 64 8 %d\n" % white + values.tobytes()))


IMAGES = {
    "8-bit grey PNG": lambda: saved(GREY, "PNG"),
    "16-bit grey PNG": lambda: saved(Image.fromarray(RAMP), "PNG"),
    "16-bit grey TIFF": lambda: saved(Image.fromarray(RAMP), "TIFF"),
    "16-bit grey TIFF, white is zero": lambda: tiff(16, 0),
    "16-bit grey TIFF, big-endian": lambda: tiff(16, 1, ">"),
    "12-bit grey TIFF": lambda: tiff(12, 1),
    "16-bit grey JPEG 2000": lambda: saved(Image.fromarray(RAMP), "JPEG2000"),
    "mode I from a PNG": lambda: Image.open(_png_as_i()),
    "PGM of 10 bits": lambda: pgm(1023),
    "PGM of 8 bits": lambda: pgm(255),
    "palette": lambda: saved(GREY.convert("P"), "PNG"),
    "palette with transparency": lambda: saved(palette(), "PNG"),
    "grey with transparency": lambda: saved(transparent("LA"), "PNG"),
    "RGB with transparency": lambda: saved(transparent("RGBA"), "PNG"),
    "WebP with transparency": lambda: saved(transparent("RGBA"), "WEBP", lossless=True, exact=True),
    "RGB JPEG": lambda: saved(GREY.convert("RGB"), "JPEG", quality=95),
    "grey JPEG": lambda: saved(GREY, "JPEG", quality=95),
    "CMYK JPEG": lambda: saved(cmyk(), "JPEG", quality=95),
    "CMYK TIFF": lambda: saved(cmyk(), "TIFF"),
    "YCbCr TIFF": lambda: saved(GREY.convert("RGB").convert("YCbCr"), "TIFF"),
    "mode LA": lambda: transparent("LA"),
    "mode La": lambda: GREY.convert("LA").convert("La"),
    "mode RGBa": lambda: GREY.convert("RGBA").convert("RGBa"),
    "mode PA": lambda: GREY.convert("P").convert("PA"),
    "mode RGBX": lambda: GREY.convert("RGBX"),
    "mode HSV": lambda: GREY.convert("RGB").convert("HSV"),
}


def _png_as_i() -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, "PNG")
    file.seek(0)
    return file


@pytest.mark.parametrize("name", IMAGES)
def test_brightness_is_kept(name: str) -> None:
    image = IMAGES[name]()
    if name == "mode I from a PNG":  # as older versions of Pillow read it
        form, image = image.format, image.convert("I")
        image.format = form
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (64, 8))
    assert np.abs(np.asarray(rgb).astype(float) - WANTED[:, :, None]).max() < 8
    assert np.abs(np.asarray(rgb).astype(float) - WANTED[:, :, None]).mean() < 1.5


def test_one_bit() -> None:
    assert np.asarray(to_rgb(saved(GREY.convert("1", dither=0), "PNG"))).reshape(-1, 3)[[0, -1]].tolist() == [
        [0, 0, 0],
        [255, 255, 255],
    ]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("F", "floating-point pixels .mode F. do not define which value"), ("I", "32-bit integer")],
)
def test_what_has_no_white(mode: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_rgb(saved(GREY.convert(mode), "TIFF"))


def test_a_16_bit_image_in_a_tree(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label, values in (("a", RAMP), ("b", RAMP[:, ::-1])):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(np.tile(values, (8, 1)))).save(folder / "0.png")
    config = FolderData(name="imagefolder", root=str(tmp_path), size=64, resize=64, workers=0, augment=False)
    data = load_file_data(config)
    images, _ = data.example()
    std, mean = (torch.tensor(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
    restored = images * std + mean
    assert restored.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (restored > 254.5 / 255).float().mean() < 0.05


def test_hidden_folders_and_files(tmp_path: Path) -> None:
    root = tmp_path / ".data" / "tree"  # hidden folders above the root do not matter
    make_tree(root, classes=2, train=3)
    plain = load_file_data(FolderData(name="imagefolder", root=str(root), workers=0))
    some = next((root / "train").rglob("*.JPEG"))
    hidden = [
        root / "train" / ".git",
        *(place / ".ipynb_checkpoints" for place in (root / "train", some.parent)),
    ]
    for place in hidden:
        place.mkdir()
        shutil.copy(some, place / "copy.JPEG")
    (some.parent / "._macos.JPEG").write_bytes(b"\x00\x05\x16\x07")
    (root / "train" / ".DS_Store").write_bytes(b"\x00")
    data = load_file_data(FolderData(name="imagefolder", root=str(root), workers=0))
    assert data.source.classes == plain.source.classes
    assert data.source.digest() == plain.source.digest()
    assert data.fingerprint == plain.fingerprint
    assert data.notes == (f"{root / 'train'}: hidden folders are ignored: .git, .ipynb_checkpoints",)
    shutil.rmtree(root / "val")
    (root / "val" / ".hidden").mkdir(parents=True)
    with pytest.raises(DataError, match="must hold one folder of images per class"):
        load_file_data(FolderData(name="imagefolder", root=str(root), workers=0))


FILES = {
    "RGB": (GREY.convert("RGB"), "JPEG"),
    "grey": (GREY, "JPEG"),
    "CMYK": (cmyk(), "JPEG"),
    "PNG": (GREY.convert("RGB"), "PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_torchcodec_decodes_what_pillow_decodes(name: str) -> None:
    pytest.importorskip("torchcodec")
    file = io.BytesIO()
    FILES[name][0].save(file, FILES[name][1])
    content = file.getvalue()
    assert torch.equal(decode(content, "torchcodec"), decode(content))
    if name != "PNG":
        for cut in (len(content) // 3, len(content) * 95 // 100):
            for decoder in ("pillow", "torchcodec"):
                with pytest.raises(OSError, match=r"(?i)truncated"):
                    decode(content[:cut], decoder)


def test_torchcodec_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree(tmp_path / "tree")
    config = FolderData(name="imagefolder", root=str(root), size=24, workers=0, decoder="torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(DataError, match=r"data\.decoder = torchcodec needs .*fastkd\[torchcodec\]"):
        load_file_data(config)


def test_a_crop_of_tensors_is_pillows_but_for_rounding() -> None:
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(pixels)
    for crop in (random_crop(32), central_crop(32, 36)):
        torch.manual_seed(3)
        ours = crop(torch.from_numpy(pixels).permute(2, 0, 1))
        torch.manual_seed(3)
        pillows = v2.functional.pil_to_tensor(crop(image))
        assert (ours.int() - pillows.int()).abs().max() <= 1
