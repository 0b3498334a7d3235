"""Rendering glyphs from font files, with a cache keyed by the files' content."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastkd.errors import DataError
from fastkd.files.atomic import is_abandoned, owner, take_room
from fastkd.files.cache import cache_folder
from fastkd.files.regular import read_regular
from fastkd.files.sealed import digest_of
from fastkd.messages import some

from .fonts import Face, FontFile, common_characters, dejavu_files, font_files, parse_characters, read_faces

SIDE = 32
# Baseline and font size leave room for accents, descenders and the shifts of augmentation.
_FONT_SIZE = 24
_BASELINE = 24
_FORMAT = 1
_MIN_CLASSES = 10
# With fewer glyphs a process pool costs more time than it saves.
_GLYPHS_WORTH_A_POOL = 200_000


@dataclass(frozen=True)
class GlyphSet:
    """Description of the rendered images ``[faces, classes, 32, 32]``, in the order of their axes."""

    faces: list[str]
    files: list[str]  # file name of each face
    classes: list[list[int]]  # code points per class; several if their images are identical in every face
    notes: list[str]  # what was left out
    digest: str  # of the images; identifies the data set


def load_glyphs(
    fonts: str | None, characters: str | None, coverage: float
) -> tuple[GlyphSet, NDArray[np.uint8]]:
    """The glyphs of a font folder (None: DejaVu) as uint8 ``[faces, classes, 32, 32]``, memory-mapped.

    Raises ``DataError``.
    """
    wanted = None if characters is None else parse_characters(characters)
    files = dejavu_files() if fonts is None else font_files(Path(fonts))
    folder = cache_folder() / f"glyphs-{_key(files, wanted, coverage)}"
    cached = _read_cache(folder)
    if cached is not None:
        return cached
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        prefix = f".rendering-{owner()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            _render_into(Path(temporary), files, wanted, coverage)
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged, or it would have been read above
            try:
                os.rename(Path(temporary) / "done", folder)
            except OSError:
                # Another process was faster; its rendering is the same.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise DataError(
            f"cannot write the glyph cache {folder}: {error}; set FASTKD_CACHE to a folder with space"
        ) from None
    rendered = _read_cache(folder)
    if rendered is None:
        raise DataError(f"the glyph cache {folder} cannot be read back; set FASTKD_CACHE to another folder")
    return rendered


def _remove_abandoned(cache: Path) -> None:
    """Delete unfinished renderings of processes that were killed."""
    for path in cache.glob(".rendering-*"):
        named = re.fullmatch(r"\.rendering-(?P<host>[A-Za-z0-9-]+)-(?P<process>\d+)-\w+", path.name)
        # One of this process may belong to another thread.
        process = int(named["process"]) if named else os.getpid()
        if named and process != os.getpid() and is_abandoned(path, named["host"], process):
            shutil.rmtree(path, ignore_errors=True)


def _key(files: Sequence[FontFile], wanted: Sequence[int] | None, coverage: float) -> str:
    from PIL import __version__ as pillow_version
    from PIL import features

    # File names matter too: they decide the order of the faces.
    settings = [
        *(_FORMAT, SIDE, _FONT_SIZE, _BASELINE, pillow_version, features.version("freetype2")),
        *(wanted, None if wanted is None else coverage),
        [[file.path.name, file.digest] for file in files],
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _read_cache(folder: Path) -> tuple[GlyphSet, NDArray[np.uint8]] | None:
    """Read the cache; None if there is none or it is damaged."""
    try:
        content = json.loads(read_regular(folder / "glyphs.json"))
        if content.pop("sha256", None) not in (None, digest_of(content)):  # None: written by an older version
            return None
        glyphs = GlyphSet(**content)
        images = np.load(folder / "images.npy", mmap_mode="r")
    except Exception:  # NumPy raises many types for damaged headers
        return None
    if images.shape != (len(glyphs.faces), len(glyphs.classes), SIDE, SIDE) or images.dtype != np.uint8:
        return None
    return (glyphs, images) if _digest(images) == glyphs.digest else None


def _digest(images: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for face in images:
        digest.update(np.ascontiguousarray(face).data)
    return digest.hexdigest()


def _render_into(
    folder: Path, files: Sequence[FontFile], wanted: Sequence[int] | None, coverage: float
) -> None:
    """Write ``folder/done/{images.npy,glyphs.json}``, with only a few faces in memory at a time."""
    source = files[0].path.parent
    faces, skipped = read_faces(files, source)
    used, points, left_out = common_characters(faces, wanted, coverage)
    notes = []
    if skipped:
        notes.append(f"unreadable font files left out: {some(skipped)}")
    if left_out:
        notes.append(f"faces left out for data.coverage={coverage}: {some(left_out)}")
    if len(points) < _MIN_CLASSES:
        raise DataError(_too_few(source, used or faces, points, left_out, wanted is not None))

    raw = np.lib.format.open_memmap(
        folder / "raw.npy", mode="w+", dtype=np.uint8, shape=(len(used), len(points), SIDE, SIDE)
    )
    take_room(folder / "raw.npy")
    kept: list[Face] = []
    twins: list[str] = []
    seen: set[bytes] = set()
    columns = [hashlib.sha256() for _ in points]  # one per character, over all faces
    blank = np.zeros(len(points), dtype=bool)
    for face, images in zip(used, _render_faces(used, points), strict=True):
        whole = hashlib.sha256(images.data).digest()
        if whole in seen:  # such as the monospaced variant of a CJK font: it would leak into validation
            twins.append(face.name)
            continue
        seen.add(whole)
        raw[len(kept)] = images
        kept.append(face)
        blank |= ~images.any(axis=(1, 2))
        for column, image in zip(columns, images, strict=True):
            column.update(image.data)
    if twins:
        notes.append(f"faces identical to another left out: {some(twins)}")

    classes: dict[bytes, list[int]] = {}
    for j, column in enumerate(columns):
        if not blank[j]:
            classes.setdefault(column.digest(), []).append(j)
    if len(classes) < _MIN_CLASSES:
        raise DataError(_too_few(source, kept, points, left_out, wanted is not None))
    if blank.any():
        notes.append(f"{int(blank.sum())} characters left out that are blank in some face")
    first = [members[0] for members in classes.values()]

    done = folder / "done"
    done.mkdir()
    images = np.lib.format.open_memmap(
        done / "images.npy", mode="w+", dtype=np.uint8, shape=(len(kept), len(first), SIDE, SIDE)
    )
    take_room(done / "images.npy")
    for i in range(len(kept)):
        images[i] = raw[i][first]
    images.flush()
    glyphs = GlyphSet(
        faces=[face.name for face in kept],
        files=[face.path.name for face in kept],
        classes=[[points[j] for j in members] for members in classes.values()],
        notes=notes,
        digest=_digest(images),
    )
    content = asdict(glyphs)
    content["sha256"] = digest_of(content)
    (done / "glyphs.json").write_text(json.dumps(content), encoding="utf-8")


def _too_few(
    source: Path, faces: Sequence[Face], points: Sequence[int], left_out: Sequence[str], wanted: bool
) -> str:
    if wanted and left_out and len(left_out) >= len(faces):
        return (
            f"data.fonts: no face in {source} has the share of data.characters that data.coverage asks for: "
            f"{some(left_out)}"
        )
    fewest = sorted(faces, key=lambda face: len(face.characters))[:3]
    return (
        f"data.fonts: the {len(faces)} faces in {source} have {len(points)} visible characters in common, at "
        f"least {_MIN_CLASSES} are needed; the faces with fewest characters are "
        + ", ".join(f"{face.name} ({len(face.characters)})" for face in fewest)
        + ("" if wanted else "; remove them, or set data.characters to leave out faces that do not cover it")
    )


def _render_faces(faces: Sequence[Face], points: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    workers = min(len(faces), os.cpu_count() or 1, 16)
    if len(faces) * len(points) < _GLYPHS_WORTH_A_POOL or workers == 1:
        for face in faces:
            yield render_face(str(face.path), face.index, points)
        return
    # Not fork: torch may already have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_leave_interrupts_to_the_parent
    ) as pool:
        pending = []
        for face in faces:
            pending.append(pool.submit(render_face, str(face.path), face.index, points))
            if len(pending) > 2 * workers:  # bounds the number of finished faces in memory
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def render_face(path: str, index: int, points: Sequence[int]) -> NDArray[np.uint8]:
    """Render characters of one face as uint8 ``[len(points), 32, 32]``, ink 255, centred on a baseline.

    An image is blank if the outline is missing or damaged.
    """
    from PIL import Image, ImageDraw, ImageFont

    # The basic layout does not depend on whether Pillow finds the Raqm library.
    font = ImageFont.truetype(path, _FONT_SIZE, index=index, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(points), SIDE, SIDE), dtype=np.uint8)
    canvas = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(canvas)
    for image, point in zip(images, points, strict=True):
        canvas.paste(0, (0, 0, SIDE, SIDE))
        try:
            draw.text((SIDE // 2, _BASELINE), chr(point), font=font, fill=255, anchor="ms")
        except OSError:
            continue
        image[:] = np.frombuffer(canvas.tobytes(), dtype=np.uint8).reshape(SIDE, SIDE)
    return images
