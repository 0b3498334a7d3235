"""Make a data set of CIFAR-100's size from emoji by several artists: some to train on, one to validate.

    python tools/make_emoji.py FOLDER                                # validated on Twitter's
    python tools/make_emoji.py FOLDER --holdout openmoji
    python tools/make_emoji.py FOLDER --holdout mozilla --exclude twitter      # to choose options on
    fastkd train RECIPE data.name=arrays data.folder=FOLDER

A class is one of Unicode's subgroups of emoji ("animal-bird", "food-fruit"), a picture one artist's drawing
of one character. Skin tones, ZWJ sequences (which mostly repeat a person in both genders) and flags of
countries and regions are left out; the flags would be a sixth of the pictures, almost the same in all sets.
The classes do not depend on which artists are held out.

The drawings are npm packages of Iconify, fetched by `npm pack`. FOLDER/SOURCES.md has their licences: a data
set with CC BY or CC BY-SA artwork must be passed on under these conditions. Needs `pip install resvg-py`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class EmojiError(Exception):
    """A problem that ends the script with one line."""


@dataclass(frozen=True)
class Package:
    """A version of a package, and who drew its pictures."""

    spec: str  # NAME@VERSION
    artist: str
    licence: str

    @property
    def name(self) -> str:
        return self.spec.rpartition("/")[2].partition("@")[0]

    @property
    def file(self) -> str:
        """The name that `npm pack` gives."""
        return re.sub("[/@]", "-", self.spec.removeprefix("@")) + ".tgz"


CHARACTERS = Package(
    "emoji-datasource@16.0.0", "", "MIT"
)  # Unicode's groups, without pictures of its own here
SETS = (
    Package("@iconify-json/noto@1.2.9", "google", "Apache-2.0"),
    Package("@iconify-json/noto-v1@1.2.5", "google", "Apache-2.0"),
    Package("@iconify-json/twemoji@1.2.5", "twitter", "CC-BY-4.0"),
    Package("@iconify-json/openmoji@1.2.29", "openmoji", "CC-BY-SA-4.0"),
    Package("@iconify-json/emojione@1.2.3", "emojione", "CC-BY-4.0"),
    Package("@iconify-json/emojione-v1@1.2.3", "emojione", "CC-BY-SA-4.0"),
    Package("@iconify-json/fxemoji@1.2.2", "mozilla", "Apache-2.0"),
    Package("@iconify-json/fluent-emoji-flat@1.2.6", "microsoft", "MIT"),
    Package("@iconify-json/fluent-emoji@1.2.7", "microsoft", "MIT"),
)
ARTISTS = tuple(dict.fromkeys(package.artist for package in SETS))
LEFT_OUT = ("skin-tone", "country-flag", "subdivision-flag")  # subgroups
OVERSAMPLING = 4  # drawn this much larger, then averaged
FAINTEST = 16  # levels of 255 between the lightest and the darkest pixel; less is blank


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded if it is missing."""
    path = folder / package.file
    if path.is_file():
        return path
    command = ["npm", "pack", "--ignore-scripts", "--loglevel=error", package.spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise EmojiError(
            f"npm, which fetches {package.spec}, is not installed; with --packages DIR the script uses the "
            f"archives that are there ({package.file})"
        ) from None
    if done.returncode or not path.is_file():
        reason = " ".join((done.stderr or done.stdout).split())[-500:] or f"status {done.returncode}"
        raise EmojiError(f"{' '.join(command)} failed: {reason}")
    return path


def read_json(path: Path, name: str) -> Any:
    """A JSON file of a package; nothing is unpacked."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            return json.load(member)
    except (OSError, EOFError, KeyError, ValueError, AssertionError, zlib.error, tarfile.TarError) as error:
        raise EmojiError(
            f"{path}: {name} cannot be read ({error}); delete the file to fetch it again"
        ) from None


def code_of(text: str) -> str:
    """Code points in lower case, without variation selectors and leading zeros: ``31-20e3``."""
    points = [f"{int(point, 16):x}" for point in text.split("-")]
    return "-".join(point for point in points if point != "fe0f")


def key_of(name: str) -> str:
    """What names of one character have in common: ``alarm-clock``, ``ALARM CLOCK``, ``alarmclock``."""
    return re.sub("[^a-z0-9]", "", name.lower())


def classes_of(emoji: list[dict[str, Any]], fewest: int) -> dict[str, str]:
    """The class of each character to draw, in Unicode's order; classes have ``fewest`` characters or more."""
    found = {
        code_of(entry["unified"]): f"{entry['category']}: {entry['subcategory']}"
        for entry in sorted(emoji, key=lambda entry: entry["sort_order"])
        if entry["subcategory"] not in LEFT_OUT and "200D" not in entry["unified"].upper().split("-")
    }
    sizes = Counter(found.values())
    return {code: name for code, name in found.items() if sizes[name] >= fewest}


class IconSet:
    """A package's drawings: SVG bodies by name, and the names of characters if it has them."""

    def __init__(self, package: Package, path: Path) -> None:
        self.package = package
        icons = read_json(path, "icons.json")
        self.info: dict[str, Any] = read_json(path, "info.json")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.names = {code_of(code): name for code, name in read_json(path, "chars.json").items()}
        self.icons: dict[str, dict[str, Any]] = icons["icons"]
        self._box = {key: icons.get(key, size) for key, size in (("width", 16), ("height", 16))}
        self.aliases: dict[str, list[str]] = defaultdict(list)
        for alias, entry in icons.get("aliases", {}).items():
            if set(entry) <= {"parent", "hidden"}:  # others are turned or mirrored
                self.aliases[entry["parent"]].append(alias)

    def svg(self, name: str) -> str:
        icon = {"left": 0, "top": 0, **self._box, **self.icons[name]}
        box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
        # A box that is not square is centred in the square picture.
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="64" height="64" viewBox="{box}">{icon["body"]}</svg>'
        )

    def drawings(self, known: dict[str, str]) -> dict[str, str]:
        """Icon names by character, by the ``known`` names if the package has no list of characters."""
        if self.names:
            return {code: name for code, name in self.names.items() if name in self.icons}
        found: dict[str, str] = {}
        for own in (True, False):
            for name in sorted(self.icons):
                for word in [name] if own else self.aliases[name]:
                    if (code := known.get(key_of(word))) is not None:
                        found.setdefault(code, name)
        return found


def known_names(sets: Iterable[IconSet], emoji: list[dict[str, Any]]) -> dict[str, str]:
    """Characters by name: the sets' names first, then their aliases, then Unicode's names and short names."""
    characters = {code_of(entry["unified"]) for entry in emoji}
    named = [(code, name, icons) for icons in sets for code, name in icons.names.items()]
    levels = (
        [(name, code) for code, name, _ in named],
        [(alias, code) for code, name, icons in named for alias in icons.aliases[name]],
        [
            (name, code_of(entry["unified"]))
            for entry in emoji
            for name in (entry["name"] or "", *entry["short_names"])
        ],
    )
    known: dict[str, str] = {}
    for level in levels:
        candidates = defaultdict(set)
        for name, code in level:
            # Short names such as "a", "+1" and "x" are also names of letters and signs.
            if code in characters and len(key_of(name)) > 2:
                candidates[key_of(name)].add(code)
        for key, codes in candidates.items():
            if len(codes) == 1:
                known.setdefault(key, *codes)
    return known


def render(svg: str, size: int) -> np.ndarray | None:
    """RGB on white, uint8 ``[3, size, size]``; None if nothing can be seen."""
    import resvg_py

    side = OVERSAMPLING * size
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True
        )
    except ValueError:  # not SVG
        return None
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), np.uint32)
    total = pixels.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 3).sum((1, 3))
    picture = ((total + OVERSAMPLING**2 // 2) // OVERSAMPLING**2).astype(np.uint8)
    return picture.transpose(2, 0, 1) if int(picture.max()) - int(picture.min()) >= FAINTEST else None


class Picture(NamedTuple):
    source: Package
    code: str
    name: str
    pixels: np.ndarray | None  # None: blank


def draw(icons: IconSet, known: dict[str, str], characters: Iterable[str], size: int) -> Iterator[Picture]:
    drawings = icons.drawings(known)
    for code in characters:
        if (name := drawings.get(code)) is not None:
            yield Picture(icons.package, code, name, render(icons.svg(name), size))


def write_part(path: Path, pictures: list[Picture], of: dict[str, str], classes: list[str]) -> None:
    """One npz file; the same pictures give the same bytes."""
    number = {name: label for label, name in enumerate(classes)}
    np.savez(
        path,
        images=np.stack([picture.pixels for picture in pictures if picture.pixels is not None]),
        target=np.array([number[of[picture.code]] for picture in pictures], np.int64),
        classes=np.array(classes),
        character=np.array([picture.code for picture in pictures]),
        source=np.array([picture.source.name for picture in pictures]),
    )


def sources(sets: list[IconSet], train: list[Picture], test: list[Picture], size: int) -> str:
    """SOURCES.md: packages, licences, attribution and numbers of pictures."""
    lines = [
        "# Sources of the pictures",
        "",
        f"Emoji by several artists, rendered at {size} x {size} on white from the SVG that Iconify packages.",
        "",
        "**These files hold the artists' work. Whoever passes them on must keep to its licences: attribution "
        "and a note of changes (CC BY, and CC BY-SA, which also asks for the same licence), the licence's "
        "text and notices (Apache, MIT).**",
        "",
        "| package | version | SHA-256 of the archive | artist | licence | source | train | test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counts = [Counter(picture.source for picture in part) for part in (train, test)]
    for icons in sets:
        package, author, licence = icons.package, icons.info["author"], icons.info["license"]
        used = " | ".join(str(count[package]) for count in counts)
        lines.append(
            f"| {package.name} | {package.spec.rpartition('@')[2]} | {icons.sha256} | {package.artist} "
            f"({author['name']}) | [{package.licence}]({licence['url']}) | {author.get('url', '')} | {used} |"
        )
    lines += [
        "",
        f"Classes: Unicode's subgroups, from {CHARACTERS.spec} ({CHARACTERS.licence}, Cal Henderson). "
        f"Rendered by resvg-py {version('resvg-py')}.",
    ]
    return "\n".join(lines) + "\n"


def chosen(text: str, option: str) -> set[str]:
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(ARTISTS)):
        raise EmojiError(
            f"{option} = {', '.join(unknown)}: no such artist; expected some of {', '.join(ARTISTS)}"
        )
    return names


def make(folder: Path, packages: Path, holdout: set[str], exclude: set[str], size: int, fewest: int) -> str:
    """Write ``folder``; returns the summary."""
    emoji = read_json(fetch(CHARACTERS, packages), "emoji.json")
    of = classes_of(emoji, fewest)
    classes = list(dict.fromkeys(of.values()))
    # All sets are read, since the names of the characters come from all.
    sets = [IconSet(package, fetch(package, packages)) for package in SETS]
    known = known_names(sets, emoji)
    sets = [icons for icons in sets if icons.package.artist not in exclude]
    drawn = [picture for icons in sets for picture in draw(icons, known, of, size)]
    seen = [picture for picture in drawn if picture.pixels is not None]
    train = [picture for picture in seen if picture.source.artist not in holdout]
    test = [picture for picture in seen if picture.source.artist in holdout]
    for part, pictures in (("train on", train), ("validate", test)):
        missing = [name for name in classes if name not in {of[picture.code] for picture in pictures}]
        if missing and (part == "train on" or len(missing) == len(classes)):
            raise EmojiError(
                f"{len(missing)} of {len(classes)} classes have no picture to {part}: {missing[0]}"
            )
    folder.mkdir(parents=True)
    for name, pictures in (("train.npz", train), ("test.npz", test)):
        write_part(folder / name, pictures, of, classes)
    (folder / "SOURCES.md").write_text(sources(sets, train, test, size), encoding="utf-8")
    counts = Counter(picture.source.artist for picture in seen)
    artists = (f"  {name}{' (test)' if name in holdout else ''}: {count:,}" for name, count in counts.items())
    untested = len(classes) - len({of[picture.code] for picture in test})
    blank = [f"{picture.source.name}/{picture.name}" for picture in drawn if picture.pixels is None]
    return "\n".join(
        [
            f"{folder}: {len(classes)} classes, {len(train):,} training pictures, {len(test):,} to validate",
            *artists,
            *([f"  {untested} classes have no picture to validate"] if untested else []),
            *([f"  left out, blank or no SVG: {len(blank)} ({', '.join(blank[:20])})"] if blank else []),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--holdout", default="twitter", help=f"artists to validate on: {', '.join(ARTISTS)}")
    parser.add_argument("--exclude", default="", help="artists to leave out")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the npm packages are kept")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--min-characters", type=int, default=5, help="fewest characters of a class")
    args = parser.parse_args(arguments)
    try:
        holdout, exclude = chosen(args.holdout, "--holdout"), chosen(args.exclude, "--exclude")
        if both := sorted(holdout & exclude):
            raise EmojiError(f"{', '.join(both)}: given to both --holdout and --exclude")
        if not holdout or holdout | exclude == set(ARTISTS):
            raise EmojiError("expected at least one artist to hold out and one to train on")
        if not 8 <= args.size <= 512 or args.min_characters < 1:
            raise EmojiError("expected --size from 8 to 512 and --min-characters of at least 1")
        if args.folder.exists():
            raise EmojiError(f"{args.folder} exists; name a new folder")
        try:
            import resvg_py  # noqa: F401
        except ImportError:
            raise EmojiError(
                "resvg-py, which renders the pictures, is missing: pip install resvg-py"
            ) from None
        with tempfile.TemporaryDirectory() as temporary:
            packages = args.packages or Path(temporary)
            packages.mkdir(parents=True, exist_ok=True)
            options = (holdout, exclude, args.size, args.min_characters)
            print(make(args.folder, packages.absolute(), *options))
    except (EmojiError, OSError) as error:
        print(f"make_emoji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
