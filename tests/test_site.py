"""The documentation site: every public name is on a page, and the hooks that rewrite links and formulas."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "tools" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_documented(hooks: Any) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md"))
    names = hooks.public_names()
    assert {"fastkd.kd_loss", "fastkd.TopKLogits", "fastkd.train.fit", "fastkd.distill.Method"} <= set(names)
    assert hooks.undocumented(names, pages) == []


def test_undocumented_names_are_found(hooks: Any) -> None:
    def bare() -> None: ...

    def good() -> None:
        """Documented."""

    class Derived(Exception): ...  # inherits a docstring, which says nothing about it

    names = {"m.bare": bare, "m.good": good, "m.Derived": Derived, "m.VALUE": 3}
    pages = "::: m.bare\n::: m.Derived\n"
    assert hooks.undocumented(names, pages) == [
        "m.bare has no docstring",
        "m.good is on no page of docs/api: add `::: m.good`",
        "m.Derived has no docstring",
        "m.VALUE is on no page of docs/api: mention it as `VALUE`",
    ]


def rewritten(hooks: Any, text: str, page: str = "formulas.md") -> str:
    file = SimpleNamespace(abs_src_path=str(DOCS / page), src_uri=page)
    config = SimpleNamespace(docs_dir=str(DOCS), repo_url="https://example.org/fastkd/")
    return hooks.on_page_markdown(text, SimpleNamespace(file=file), config, None)


def test_links_into_the_repository(hooks: Any, caplog: pytest.LogCaptureFixture) -> None:
    blob = "https://example.org/fastkd/blob/main"
    assert rewritten(hooks, "[a](../CONTRIBUTING.md#tests)") == f"[a]({blob}/CONTRIBUTING.md#tests)"
    assert rewritten(hooks, "[a](../../setup.py)", "speed/README.md") == f"[a]({blob}/setup.py)"
    assert rewritten(hooks, "[a](../csrc)") == "[a](https://example.org/fastkd/tree/main/csrc)"
    for same in ("[a](data.md#x)", "[a](https://a.b/c)", "[a](#b)", "```\n[a](../setup.py)\n```\n"):
        assert rewritten(hooks, same) == same
    assert rewritten(hooks, "[a](../data.md)", "api/losses.md") == "[a](../data.md)"
    assert not caplog.records
    rewritten(hooks, "[a](../csrc/missing.h)")
    assert "formulas.md links to ../csrc/missing.h, which is not in the repository" in caplog.text


def test_formulas(hooks: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("latex2mathml")
    assert hooks.to_mathml(r"\(T^2\)", "p").startswith("<math ")
    assert 'rspace="0.17em">log</mo><mi>x</mi>' in hooks.to_mathml(r"\(\log x\)", "p")
    assert 'display="block"' in hooks.to_mathml("\\[\nx\n\\]", "p")
    assert not caplog.records
    hooks.to_mathml(r"\[\begin{aligned} a &= b \end{aligned}\]", "p")
    hooks.to_mathml(r"\(\notacommand x\)", "p")
    assert [record.levelno for record in caplog.records] == 2 * [logging.WARNING]


BREAKS = {
    "nowhere.md": ("index.md", "[a](nowhere.md)"),
    "#no-heading": ("index.md", "[a](data.md#no-heading)"),
    "/absolute/": ("index.md", "[a](/absolute/)"),
    "unlisted.md": ("unlisted.md", "# A page without a place"),
    "no-file.h": ("index.md", "[a](../csrc/no-file.h)"),
    "notacommand": ("formulas.md", r"$\notacommand x$"),
    "add `::: fastkd.top_k`": ("api/forms.md", "::: fastkd.top_k"),  # removed, not added
}


def test_strict_build_fails(tmp_path: Path) -> None:
    """One build of a copy with each fault in it; what is broken is named."""
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: extra [docs]")
    for name in ("docs", "tools", "csrc", "examples", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastkd").symlink_to(ROOT / "fastkd")
    for page, text in BREAKS.values():
        path = tmp_path / "docs" / page
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = old.replace(f"{text}\n", "") if text in old else f"{old}\n\n{text}\n"
        path.write_text(new, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert [name for name in BREAKS if name not in done.stderr] == []
