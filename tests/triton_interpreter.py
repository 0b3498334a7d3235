"""Triton's interpreter, at two to three times its speed.

While it runs a kernel it replaces the functions of `triton.language` by its own. It does so anew for every
call of a function inside the kernel, which is most of its time; here it does so once per launch. It also
makes its table of dtypes anew for every look into it; here each dtype is looked up once.
"""

import functools

from triton import language as tl
from triton.runtime import interpreter


@functools.cache
def _languages_of(fn):
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


def speed_up(monkeypatch):
    _patch_once_per_launch(monkeypatch)
    _look_dtypes_up_once(monkeypatch)


def _patch_once_per_launch(monkeypatch):
    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn):
        languages = _languages_of(fn)
        if patched and languages <= patched:  # a call inside a kernel; Triton ignores what it gets
            return None
        scope = patch(fn)
        if not patched:  # a launch, which restores what it found
            restore = scope.restore

            def restore_all():
                patched.clear()
                restore()

            scope.restore = restore_all
        patched.update(languages)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)


def _look_dtypes_up_once(monkeypatch):
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)
    # Types of pointers have no hash.
    monkeypatch.setattr(
        interpreter, "_get_np_dtype", lambda kind: (known if type(kind) is tl.dtype else look_up)(kind)
    )
