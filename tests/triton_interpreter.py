"""Triton's interpreter, at three times its speed.

While it runs a kernel it replaces the functions of `triton.language` by its own. It does so anew for every
call of a function inside the kernel, which is most of its time; here it does so once per launch. It also
makes its table of dtypes anew for every look into it, and the shape and the type of a tile anew for every
result, and checks and converts the operands of every operation; here each is made once, and operands
that already fit each other are taken as they are. What is computed is the same.
"""

import functools

from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@functools.cache
def _languages_of(fn):
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


def speed_up(monkeypatch):
    _patch_once_per_launch(monkeypatch)
    _look_dtypes_up_once(monkeypatch)
    _make_types_once(monkeypatch)
    _make_shapes_once(monkeypatch)
    _convert_operands_once(monkeypatch)


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


def _make_types_once(monkeypatch):
    make, known = tl.block_type.__init__, {}

    def init(self, element_ty, shape):
        if type(element_ty) is not tl.dtype:
            make(self, element_ty, shape)
            return
        key = element_ty, *(getattr(size, "value", size) for size in shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    monkeypatch.setattr(tl.block_type, "__init__", init)


def _make_shapes_once(monkeypatch):
    make, known = tl.tensor.__init__, {}

    def init(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(known[key], handle=handle, type=type, dtype=type.scalar)

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    monkeypatch.setattr(tl.tensor, "__init__", init)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_impl_value)


def _convert_operands_once(monkeypatch):
    """Those of binary operations: two tiles of one type, and numbers, which become tiles of constants."""
    convert, known = TritonSemantic.binary_op_type_checking_impl, {}

    def operands(self, lhs, rhs, *flags, **named):
        number, tile = (lhs, rhs) if isinstance(rhs, tl.tensor) else (rhs, lhs)
        # Not pointers, nor the types that division converts.
        if not isinstance(tile, tl.tensor) or tile.dtype not in (tl.float32, tl.int32, tl.int64, tl.int1):
            return convert(self, lhs, rhs, *flags, **named)
        if isinstance(number, tl.tensor):
            if number.dtype is tile.dtype:
                return self.broadcast_impl_value(lhs, rhs)
            return convert(self, lhs, rhs, *flags, **named)
        key = number, type(number), tile is lhs, tile.dtype, id(tile.shape), flags, *named.items()
        constant = known.get(key)
        if constant is None:
            converted = convert(self, lhs, rhs, *flags, **named)
            same, constant = converted if tile is lhs else converted[::-1]
            if same is not tile:
                return converted
            if len(known) == 1000:
                known.clear()
            known[key] = constant
        return (tile, constant) if tile is lhs else (constant, tile)

    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", operands)
