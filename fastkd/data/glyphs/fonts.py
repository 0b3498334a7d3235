"""Fonts for the glyph data set: faces, their characters, and which of them are for validation."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastkd.errors import DataError
from fastkd.imports import import_matplotlib
from fastkd.messages import some

DEJAVU_HOLDOUT = ("DejaVu Sans Bold Oblique", "DejaVu Serif Italic", "DejaVu Sans Mono Bold")
_TOO_FEW_CHARACTERS = ("DejaVuSansDisplay", "DejaVuSerifDisplay")
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_HOLDOUT_EVERY = 4


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: Path
    index: int  # within a collection
    name: str  # the font's full name, made unique within the folder
    characters: frozenset[int] = field(repr=False)  # code points that have a glyph


@dataclass(frozen=True)
class FontFile:
    path: Path
    digest: str  # of the content


def dejavu_files() -> list[FontFile]:
    """The files of the 12 DejaVu faces that come with matplotlib."""
    folder = Path(import_matplotlib().get_data_path()) / "fonts" / "ttf"
    files = [path for path in sorted(folder.glob("DejaVu*.ttf")) if path.stem not in _TOO_FEW_CHARACTERS]
    if len(files) != 12:
        raise DataError(f"{folder}: expected the 12 DejaVu faces of matplotlib, found {len(files)}")
    return _with_digests(files)


def font_files(folder: Path) -> list[FontFile]:
    """Every TTF, OTF and TTC file under ``folder``, each content once. Raises ``DataError``."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"data.fonts: {folder} {what}; expected a folder of TTF, OTF or TTC files")
    files = _with_digests(
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    )
    if not files:
        raise DataError(f"data.fonts: {folder} holds no readable TTF, OTF or TTC file")
    return files


def _with_digests(paths: Iterable[Path]) -> list[FontFile]:
    files: dict[str, FontFile] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files.setdefault(digest, FontFile(path, digest))  # links and copies are used once
    return list(files.values())


def read_faces(files: Sequence[FontFile], folder: Path) -> tuple[list[Face], list[str]]:
    """Every face of the files, and the unusable files (name and reason).

    Raises ``DataError`` that names ``folder`` if there is no usable face.
    """
    faces: list[Face] = []
    skipped: list[str] = []
    names: set[str] = set()
    coverages: dict[frozenset[int], frozenset[int]] = {}
    for file in files:
        try:
            read = list(_faces_of(file.path))
        except Exception as error:  # fontTools raises many types for damaged files
            skipped.append(f"{file.path.name} ({type(error).__name__}: {str(error)[:80]})")
            continue
        for index, name, characters in read:
            unique = name if name not in names else f"{name} [{file.path.name}:{index}]"
            names.add(unique)
            # The weights of a CJK family cover the same 45,000 characters: share one large set.
            shared = coverages.setdefault(characters, characters)
            faces.append(Face(file.path, index, unique, shared))
    if not faces:
        raise DataError(f"data.fonts: {folder} holds no usable font; could not read {some(skipped)}")
    return faces, skipped


def _faces_of(path: Path) -> Iterable[tuple[int, str, frozenset[int]]]:
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns about harmless table versions
    with path.open("rb") as file:
        header = file.read(12)
    # A collection's header has the number of faces; a single font ignores fontNumber.
    count = int.from_bytes(header[8:12], "big") if header[:4] == b"ttcf" else 1
    for index in range(count):
        # Pillow renders, so it must be able to open the face too.
        ImageFont.truetype(str(path), 16, index=index)
        with TTFont(path, fontNumber=index, lazy=True) as font:
            name = font["name"].getBestFullName() or f"{path.stem}:{index}"
            yield index, name, frozenset(font.getBestCmap() or ())


def parse_characters(text: str) -> list[int]:
    """Code points of ``"4E00-9FA5"``, ``"41-5A,61-7A"`` or ``"U+4E00-U+9FA5"``. Raises ``DataError``."""
    points: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip().upper().removeprefix("U+") for piece in part.partition("-"))
        try:
            low = int(first, 16)
            high = int(last, 16) if dash else low
        except ValueError:
            raise DataError(
                f"data.characters: {part.strip()!r} is not a range of hexadecimal numbers such as 4E00-9FA5"
            ) from None
        if not 0 <= low <= high <= 0x10FFFF:
            raise DataError(f"data.characters: {part.strip()!r} is empty or beyond 10FFFF")
        points.update(range(low, high + 1))
    return sorted(points)


def common_characters(
    faces: Sequence[Face], wanted: Sequence[int] | None, coverage: float
) -> tuple[list[Face], list[int], list[str]]:
    """The faces to use, the characters that all of them have, and the excluded faces (with reason).

    With ``wanted``, a face is excluded if it has less than a share ``coverage`` of the wanted characters that
    any face has. Separators, control characters and unassigned code points are ignored.
    """
    left_out: list[str] = []
    used = list(faces)
    if wanted is not None:
        available = frozenset(wanted).intersection(frozenset().union(*(face.characters for face in faces)))
        used = []
        for face in faces:
            share = len(available & face.characters) / max(1, len(available))
            if available and share >= coverage:
                used.append(face)
            else:
                left_out.append(f"{face.name} ({share:.1%} of the wanted characters)")
        common = available
    else:
        common = faces[0].characters
    for face in used:
        common &= face.characters
    if not used:
        common = frozenset()
    return used, [point for point in sorted(common) if _is_visible(point)], left_out


def _is_visible(point: int) -> bool:
    return unicodedata.category(chr(point))[0] not in "ZC"


def split_faces(
    names: Sequence[str],
    files: Sequence[str],
    holdout: Sequence[str] | None,
    exclude: Sequence[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation faces, given each face's name and file.

    ``holdout`` names the validation faces. By default every fourth *file* in order of name is used for
    validation, or the last one if there are fewer than four: faces of one collection often share outlines, so
    splitting them would leak training images into validation. A single file is split by faces. ``exclude``
    names unused faces. Raises ``DataError``.
    """
    if exclude:
        _check_names(names, exclude, "data.exclude")
        kept = [i for i, name in enumerate(names) if name not in exclude]
        if len(kept) < 2:
            raise DataError(f"data.exclude leaves {len(kept)} of {len(names)} faces; at least two are needed")
        parts = split_faces([names[i] for i in kept], [files[i] for i in kept], holdout)
        train, val = ([kept[i] for i in part] for part in parts)
        return train, val
    if holdout is not None:
        return _split_by_name(names, holdout)
    keys: Sequence[str] = files if len(set(files)) > 1 else names
    groups = sorted(set(keys)) if keys is files else list(keys)
    if len(groups) < 2:
        raise DataError(
            f"data.fonts: there is one usable face ({names[0]}); "
            "at least two are needed, one to train and one to validate"
        )
    held = set(groups[_HOLDOUT_EVERY - 1 :: _HOLDOUT_EVERY]) or {groups[-1]}
    train = [i for i, key in enumerate(keys) if key not in held]
    return train, [i for i, key in enumerate(keys) if key in held]


def _split_by_name(names: Sequence[str], holdout: Sequence[str]) -> tuple[list[int], list[int]]:
    _check_names(names, holdout, "data.holdout")
    train = [i for i, name in enumerate(names) if name not in holdout]
    val = [i for i, name in enumerate(names) if name in holdout]
    if not train or not val:
        raise DataError(f"data.holdout leaves {len(train)} training and {len(val)} validation faces")
    return train, val


def _check_names(names: Sequence[str], wanted: Sequence[str], option: str) -> None:
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise DataError(f"{option}: no face {unknown[0]!r}; there are {some(names, 20)}")
