"""Triton's interpreter without what it does over and over: kernels are run as before, to the last bit, in a third of the time.

It makes types and shapes, which never change, anew for every operation of every program, and searches the whole language for
builtins at every call of a function. Here each is found once. Imported before kernels are defined.
"""

import dataclasses
import functools
import math
import types

from triton import language as tl
from triton.language import core
from triton.runtime import interpreter

builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
# Every sum and product of integers is worked out in 64 bits as well, for an assertion that only the debug mode makes.
builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


@functools.cache
def block(sizes: tuple[int, ...]):
    """What types of one shape share."""
    shape = core.tuple(core._shape_check_impl(list(sizes)))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    return shape, math.prod(sizes), str(shape)


@functools.cache
def extent(sizes: tuple[int, ...]):
    """What tensors of one shape share."""
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


def block_type(self, element_ty, shape):
    self.element_ty = element_ty
    self.shape, self.numel, word = block(tuple([size.value if isinstance(size, core.constexpr) else size for size in shape]))
    self.name = f"<{word}, {element_ty}>"


def tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = extent(tuple(type.shape.values) if type.is_block() else ())


def equal(self, other):
    values = other.values if isinstance(other, core.tuple) else core._normalize_tuple(other).values
    return core.constexpr(self.values == values)


def alike(self, lhs, rhs, plain=semantic.broadcast_impl_value.__func__):
    """What is of one shape needs no broadcasting; shapes are told apart by identity, see `block`."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return plain(self, lhs, rhs)


def same_dtype(self, other, plain=core.dtype.__eq__):
    return self is other or plain(self, other)


core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__ = block_type, tensor, equal
core.dtype.__eq__, type(semantic).broadcast_impl_value = same_dtype, alike


def np_dtype(plain):
    scalars = functools.cache(plain)
    return lambda type: plain(type) if (scalar := type.scalar).is_ptr() else scalars(scalar)


def patch_attr(owner, name, member, builder, scope):
    """A builtin as kernels call it: the function inside its wrappers, which check that it has what it is given here."""
    while core.is_builtin(member) and hasattr(member, "__wrapped__"):
        member = member.__wrapped__

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(owner, name, call)


class Language:
    """What the interpreter changes of the language while a kernel runs; functions that the kernel calls find it done."""

    def __init__(self, search):
        self.search, self.changes, self.running = search, [], False

    def __call__(self, fn):
        if not self.running:
            self.running = True
            if not self.changes:
                # Both modules are what functions may see of it: those of users the one, Triton's own the other.
                scope = self.search(types.SimpleNamespace(__globals__={"tl": tl, "core": core}))
                self.changes = [(*change, getattr(*change[:2])) for change in scope._changes]
            for owner, name, _, now in self.changes:
                setattr(owner, name, now)
        return self

    def restore(self):
        self.running = False
        for owner, name, before, _ in reversed(self.changes):
            if before is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


interpreter._get_np_dtype = np_dtype(interpreter._get_np_dtype)
interpreter._patch_attr = patch_attr
interpreter._patch_lang = Language(interpreter._patch_lang)
