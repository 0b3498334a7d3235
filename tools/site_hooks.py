"""What `mkdocs build` does beside mkdocs: links into the repository, formulas, and undocumented names.

- A link from a page to a file outside docs/, such as ``../csrc/row_formulas.h``, works as it is in the
  repository. On the site it leads to the file below ``repo_url``; an image is copied into the site.
- Formulas, ``$…$`` and fenced ``math`` blocks as on GitHub, become MathML, which browsers render themselves.
- A public name that has no docstring, or is on no page of docs/api, is a warning, as is a link to a file that
  does not exist. `--strict` makes warnings errors.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks.site")

# What users import: every name in `__all__`, or the public classes and functions that the module defines.
PUBLIC = (
    "fastkd", "fastkd.distill", "fastkd.train", "fastkd.integrations.liger", "fastkd.integrations.mdistiller",
    "fastkd.integrations.modelopt", "fastkd.integrations.timm", "fastkd.integrations.torchdistill",
    "fastkd.integrations.trl",
)  # fmt: skip

# Shared by two of these modules.
INTERNAL = ("fastkd.integrations.liger.masked_jsd",)

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_FUNCTION = re.compile(r"<mi>(log|cosh|tanh|exp)</mi>(?!<mo[^>]*>&#x00028;)")
_MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def public_names() -> dict[str, Any]:
    """Public objects by full name. Modules whose package is not installed are left out."""
    found = {}
    for name in PUBLIC:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            LOG.info("%s is not checked: %s", name, error)
            continue
        listed = getattr(module, "__all__", None)
        if listed is None:
            listed = [
                key
                for key, value in vars(module).items()
                if not key.startswith("_")
                and (inspect.isclass(value) or inspect.isfunction(value))
                and value.__module__ == name
            ]
        found |= {f"{name}.{key}": getattr(module, key) for key in listed}
    # `fastkd.fit` is shown as fastkd.train.fit.
    return {name: value for name, value in found.items() if name not in (*INTERNAL, "fastkd.fit")}


def undocumented(names: dict[str, Any], pages: str) -> list[str]:
    """What is wrong with the documentation of public names, given the text of the pages of docs/api."""
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    wrong = []
    for name, value in names.items():
        if inspect.isclass(value) or inspect.isfunction(value):
            if not (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__"):
                wrong.append(f"{name} has no docstring")
            if name not in shown:
                wrong.append(f"{name} is on no page of docs/api: add `::: {name}`")
        elif f"`{name.rpartition('.')[2]}`" not in pages:
            wrong.append(f"{name} is on no page of docs/api: mention it as `{name.rpartition('.')[2]}`")
    # A dataclass without a docstring gets its signature as one.
    return wrong + [
        f"{name} has no docstring"
        for name, value in names.items()
        if inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
    ]


def on_pre_build(config: Any) -> None:
    folder = Path(config.docs_dir) / "api"
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")))
    for line in undocumented(public_names(), pages):
        LOG.warning(line)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    docs, folder = Path(config.docs_dir), Path(page.file.abs_src_path).parent

    def rewrite(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        path = Path(os.path.normpath(folder / target))
        if not target.startswith("..") or path.is_relative_to(docs):
            return match[0]
        if not path.is_relative_to(ROOT) or not path.exists():
            LOG.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if match["image"]:
            return f"![{match['text']}]({_copied(path, name, page, config, files)})"
        kind = "tree" if path.is_dir() else "blob"
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{name}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(rewrite, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(rewrite, markdown[end:])])


def _copied(path: Path, name: str, page: Any, config: Any, files: Any) -> str:
    from mkdocs.structure.files import File

    source = f"assets/repository/{name}"
    if files.get_file_from_path(source) is None:
        files.append(File.generated(config, source, abs_src_path=str(path)))
    return os.path.relpath(source, Path(page.file.src_uri).parent)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    def convert(match: re.Match[str]) -> str:
        return to_mathml(unescape(match[2]).strip(), page.file.src_uri)

    return _MATH.sub(convert, html)


def to_mathml(text: str, where: str) -> str:
    r"""MathML of ``\(…\)`` or ``\[…\]``; a formula that cannot be converted is a warning."""
    from latex2mathml.converter import convert

    formula, display = text[2:-2].strip(), "block" if text.startswith("\\[") else "inline"
    try:
        mathml = convert(formula, display=display)
    except Exception as error:
        LOG.warning("%s has the formula %s, which cannot be converted: %r", where, formula, error)
        return text
    # A function's name stands apart from an argument without parentheses.
    mathml = _FUNCTION.sub(r'<mo form="prefix" lspace="0.17em" rspace="0.17em">\1</mo>', mathml)
    # Bars are given the spacing of a binary operator, on one side of what they enclose.
    mathml = mathml.replace("<mo>&#x0007C;</mo>", '<mo form="prefix" lspace="0" rspace="0">&#x0007C;</mo>')
    # An unknown command or environment is taken over as text.
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        LOG.warning("%s has the formula %s, part of which is unknown to latex2mathml", where, formula)
    return f'<div class="formula">{mathml}</div>' if display == "block" else mathml
