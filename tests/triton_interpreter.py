"""Triton's interpreter, at three times its speed.

While it runs a kernel it replaces the functions of `triton.language` by its own. It does so anew for every
call of a function inside the kernel, which is most of its time; here it does so once per launch. It also
makes its table of dtypes anew for every look into it, and the shape and the type of a tile anew for every
result, and checks and converts the operands of every operation; here each is made once, and operands
that already fit each other are taken as they are; others are converted and broadcast by numpy. What is
computed is the same, but for the overflow of integers, which Triton computes and ignores: here it is an
error.
"""

import functools

import numpy as np
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
    _broadcast_by_numpy(monkeypatch)
    _check_overflow_by_numpy(monkeypatch)
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

    monkeypatch.setattr(tl.tensor, "__init__", init)


# Whose values numpy holds as they are.
PLAIN = {tl.float32.name, tl.int32.name, tl.int64.name, tl.int1.name}


def _fit_by_numpy(known, fit, lhs, rhs, *how):
    """What ``fit(lhs, rhs)`` returns, two tiles converted and broadcast to fit each other.

    ``known``: the types of its results by those of its arguments, and by ``how`` else it was called."""
    if lhs.dtype.name not in PLAIN or rhs.dtype.name not in PLAIN:  # pointers have other names
        return fit(lhs, rhs)
    key = lhs.dtype.name, rhs.dtype.name, id(lhs.shape), id(rhs.shape), *how  # shapes are made once
    wanted = known.get(key)
    if wanted is None:
        both = fit(lhs, rhs)
        known[key] = [None if new is old else new.type for new, old in zip(both, (lhs, rhs), strict=True)]
        return both
    return tuple(map(_of_type, (lhs, rhs), wanted))


def _of_type(tile, wanted):
    if wanted is None:
        return tile
    data = np.empty(wanted.shape if wanted.is_block() else 1, interpreter._get_np_dtype(wanted.scalar))
    data[...] = tile.handle.data
    return tl.tensor(interpreter.TensorHandle(data, wanted.scalar), wanted)


def _broadcast_by_numpy(monkeypatch):
    broadcast, known = TritonSemantic.broadcast_impl_value, {}

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return _fit_by_numpy(known, functools.partial(broadcast, self), lhs, rhs)

    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_impl_value)


def _check_overflow_by_numpy(monkeypatch):
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def sanitize_overflow(self, lhs, rhs, operation):
        kind = lhs.dtype
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        value = exact[operation.__name__](*(one.handle.data.astype(np.int64) for one in (lhs, rhs)))
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        message = f"{kind} overflow detected for operation {operation.__name__}"
        assert low <= value.min(), message
        assert value.max() <= high, message

    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", sanitize_overflow)


def _convert_operands_once(monkeypatch):
    """Those of binary operations: two tiles, and numbers, which become tiles of constants."""
    convert, known, constants = TritonSemantic.binary_op_type_checking_impl, {}, {}

    def operands(self, lhs, rhs, *flags, **named):
        number, tile = (lhs, rhs) if isinstance(rhs, tl.tensor) else (rhs, lhs)
        if isinstance(number, tl.tensor):
            if lhs.shape is rhs.shape and lhs.dtype is rhs.dtype is tl.float32:
                return lhs, rhs
            return _fit_by_numpy(
                known, lambda *both: convert(self, *both, *flags, **named), lhs, rhs, flags, *named.items()
            )
        if not isinstance(tile, tl.tensor) or tile.dtype.name not in PLAIN:
            return convert(self, lhs, rhs, *flags, **named)
        # As written, for NaN and the sign of 0.
        key = repr(number), type(number), tile is lhs, tile.dtype, id(tile.shape), flags, *named.items()
        constant = constants.get(key)
        if constant is None:
            converted = convert(self, lhs, rhs, *flags, **named)
            same, constant = converted if tile is lhs else converted[::-1]
            if same is not tile:
                return converted
            if len(constants) == 1000:
                constants.clear()
            constants[key] = constant
        return (tile, constant) if tile is lhs else (constant, tile)

    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", operands)
