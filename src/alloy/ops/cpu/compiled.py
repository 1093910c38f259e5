"""Loops that torch has no good operation for, compiled by LLVM for this processor when they are first used.

They need llvmlite (`pip install "alloy-lm[cpu]"`), take addresses of fp32 numbers and run on one core. Compiling one takes
some 50 ms.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

log = logging.getLogger(__name__)

Loop = Callable[..., None]

# what is computed together on a side: as many sums as leave registers for what they are made of
TILE = 4
# sums may be reordered and products joined to them; NaN and infinity keep their meaning
FAST = ("reassoc", "contract", "nsz")
# code lives as long as what owns it
_owners: list[Any] = []


@cache
def few_rows(width: int | None = None) -> Loop | None:
    """y = x w^T for x (rows, inputs), w (outputs, inputs) and y (rows, outputs), all contiguous: addresses of x, w and y,
    then rows, outputs and inputs. `width` is of vectors; None where nothing can be compiled.

    Weights are read once from memory, in order, four rows of them at a time, each as they meet the rows of x.
    """
    f = _begin("few_rows", 3, 3, width)
    if f is None:
        return None
    x, w, y, rows, outputs, inputs = f.args
    with f.range(outputs, TILE) as n, f.range(rows, TILE) as m:
        rows_of_tile, outputs_of_tile = f.tile(m, rows), f.tile(n, outputs)
        left = [f.at(x, f.times(i, inputs)) for i in rows_of_tile]
        right = [f.at(w, f.times(j, inputs)) for j in outputs_of_tile]
        sums = [[f.new_sum() for _ in right] for _ in left]
        for k in f.vectors(inputs):
            ones, others = [f.read(at, k) for at in left], [f.read(at, k) for at in right]
            for line, one in zip(sums, ones, strict=True):
                for place, other in zip(line, others, strict=True):
                    f.add_to(place, f.product(one, other))
        for i, line in zip(rows_of_tile, sums, strict=True):
            for j, place in zip(outputs_of_tile, line, strict=True):
                f.write(f.at(y, f.plus(f.times(i, outputs), j)), f.total(place))
    return f.compiled()


@cache
def state_rows(width: int | None = None) -> Loop | None:
    """The recurrence of `alloy.ops.ssd_step` in one pass over the states: h = decay h + (d x) B, y = h C + D x.

    Addresses of h (batch, heads, head_dim, state), xbc (batch, channels: x, B, C), d and decay (batch, heads), D (heads,) and
    y (batch, heads * head_dim), then batch, heads, head_dim, groups, state and what lies between rows of h and of xbc; all
    else is contiguous. `width` and None as in `few_rows`.
    """
    f = _begin("state_rows", 6, 7, width)
    if f is None:
        return None
    h, xbc, d, decay, D, y, batch, heads, head_dim, groups, state, h_stride, xbc_stride = f.args
    share, inner = f.over(heads, groups), f.times(heads, head_dim)
    with f.range(batch) as row, f.range(heads) as head:
        here = f.plus(f.times(row, heads), head)
        kept, step, skip = f.read_one(decay, here), f.read_one(d, here), f.read_one(D, head)
        x = f.at(xbc, f.times(row, xbc_stride))
        B = f.at(x, f.plus(inner, f.times(f.over(head, share), state)))
        C = f.at(B, f.times(groups, state))
        first = f.times(head, head_dim)
        own = f.at(h, f.plus(f.times(row, h_stride), f.times(first, state)))
        x, out = f.at(x, first), f.at(y, f.plus(f.times(row, inner), first))
        kept = f.spread(kept)
        with f.range(head_dim, TILE) as start:
            places = f.tile(start, head_dim)
            inputs = [f.read_one(x, p) for p in places]
            added = [f.spread(f.product(value, step)) for value in inputs]
            states = [f.at(own, f.times(p, state)) for p in places]
            sums = [f.new_sum() for _ in places]
            for k in f.vectors(state):
                b, c = f.read(B, k), f.read(C, k)
                # all are read before one is written: a place that stands for the last is computed from what the last was
                old = [f.read(at, k) for at in states]
                for at, before, more, place in zip(states, old, added, sums, strict=True):
                    new = f.sum_of(f.product(before, kept), f.product(more, b))
                    f.write_vector(at, k, new)
                    f.add_to(place, f.product(new, c))
            for p, value, place in zip(places, inputs, sums, strict=True):
                f.write(f.at(out, p), f.sum_of(f.total(place), f.product(skip, value)))
    return f.compiled()


def _begin(name: str, pointers: int, numbers: int, width: int | None) -> "_Writer | None":
    """What writes a function; None without llvmlite, or where it knows nothing of the processor."""
    if find_spec("llvmlite") is None:
        return None
    try:
        return _Writer(name, pointers, numbers, width)
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        log.warning("llvmlite cannot compile for this processor (%s); PyTorch computes instead, more slowly", error)
        return None


class _Writer:
    """A function of `pointers` addresses and then `numbers` whole numbers, written from its first operation to its last.

    Attributes:
        args: its arguments
        width: numbers in a vector
    """

    def __init__(self, name: str, pointers: int, numbers: int, width: int | None) -> None:
        from llvmlite import binding, ir

        self._ir: Any = ir
        self._llvm: Any = binding
        self._llvm.initialize_native_target()
        self._llvm.initialize_native_asmprinter()
        features: Any = self._llvm.get_host_cpu_features()
        self._machine: Any = self._llvm.Target.from_default_triple().create_target_machine(
            cpu=self._llvm.get_host_cpu_name(), features=features.flatten(), opt=3
        )
        self.width = width or (16 if features.get("avx512f") else 8 if features.get("avx2") else 4)
        self._long, self._short, self._one = ir.IntType(64), ir.IntType(32), ir.FloatType()
        self._pointer: Any = ir.PointerType()
        self._vector: Any = ir.VectorType(self._one, self.width)
        self._module: Any = ir.Module()
        self._module.triple = self._machine.triple
        self._kinds = [self._pointer] * pointers + [self._long] * numbers
        function: Any = ir.Function(self._module, ir.FunctionType(ir.VoidType(), self._kinds), name)
        self.args: Sequence[Any] = function.args
        self._b: Any = ir.IRBuilder(function.append_basic_block())
        # which numbers of a vector there are, where it is the last of a row
        self._mask: Any = None

    def plus(self, i: Any, j: Any) -> Any:
        return self._b.add(i, j)

    def times(self, i: Any, j: Any) -> Any:
        return self._b.mul(i, j)

    def over(self, i: Any, j: Any) -> Any:
        return self._b.sdiv(i, j)

    def product(self, a: Any, b: Any) -> Any:
        return self._b.fmul(a, b, flags=FAST)

    def sum_of(self, a: Any, b: Any) -> Any:
        return self._b.fadd(a, b, flags=FAST)

    def at(self, base: Any, index: Any) -> Any:
        """The address of a number."""
        return self._b.gep(base, [index], source_etype=self._one)

    def tile(self, start: Any, count: Any) -> list[Any]:
        """`TILE` whole numbers from `start` on; in the place of those that are not below `count` the last once more."""
        last = self._b.sub(count, self._long(1))
        some = [self._b.add(start, self._long(j)) for j in range(TILE)]
        return [self._b.select(self._b.icmp_signed("<", i, last), i, last) for i in some]

    def read_one(self, base: Any, index: Any) -> Any:
        return self._b.load(self.at(base, index), typ=self._one)

    def write(self, at: Any, value: Any) -> None:
        self._b.store(value, at)

    def read(self, base: Any, k: Any) -> Any:
        """The vector from `k` on, with zeros where the row has ended."""
        at = self.at(base, k)
        if self._mask is None:
            return self._b.load(at, typ=self._vector, align=4)
        zeros = self._ir.Constant(self._vector, None)
        kinds = [self._pointer, self._short, self._mask.type, self._vector]
        return self._call(
            f"masked.load.v{self.width}f32.p0", self._vector, kinds, [at, self._short(4), self._mask, zeros]
        )

    def write_vector(self, base: Any, k: Any, value: Any) -> None:
        at = self.at(base, k)
        if self._mask is None:
            self._b.store(value, at, align=4)
            return
        kinds = [self._vector, self._pointer, self._short, self._mask.type]
        name, nothing = f"masked.store.v{self.width}f32.p0", self._ir.VoidType()
        self._call(name, nothing, kinds, [value, at, self._short(4), self._mask])

    def spread(self, value: Any) -> Any:
        """A vector of one number."""
        kind = self._ir.VectorType(value.type, self.width)
        first = self._b.insert_element(self._ir.Constant(kind, self._ir.Undefined), value, self._short(0))
        zeros = self._ir.Constant(self._ir.VectorType(self._short, self.width), None)
        return self._b.shuffle_vector(first, first, zeros)

    def new_sum(self) -> Any:
        """The place of a sum of vectors, empty."""
        with self._b.goto_entry_block():
            place = self._b.alloca(self._vector)
        self._b.store(self._ir.Constant(self._vector, None), place)
        return place

    def add_to(self, place: Any, value: Any) -> None:
        self._b.store(self.sum_of(self._b.load(place, typ=self._vector), value), place)

    def total(self, place: Any) -> Any:
        """The sum of all numbers of the vector at a place."""
        given = [self._one(0.0), self._b.load(place, typ=self._vector)]
        return self._call(f"vector.reduce.fadd.v{self.width}f32", self._one, [self._one, self._vector], given)

    @contextmanager
    def range(self, stop: Any, step: int = 1) -> Iterator[Any]:
        """A loop over 0, step, ... below `stop`; the block of the `with` is its body."""
        b, before = self._b, self._b.block
        head, body, end = (b.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(self._long)
        i.add_incoming(self._long(0), before)
        b.cbranch(b.icmp_signed("<", i, stop), body, end)
        b.position_at_end(body)
        yield i
        i.add_incoming(b.add(i, self._long(step)), b.block)
        b.branch(head)
        b.position_at_end(end)

    def vectors(self, count: Any) -> Iterator[Any]:
        """For the vectors of a row of `count` numbers, where they begin: what follows is written twice, for whole ones and
        for the last, of which there may be a part."""
        b = self._b
        whole = b.and_(count, self._long(-self.width))
        with self.range(whole, self.width) as k:
            yield k
        with b.if_then(b.icmp_signed("<", whole, count)):
            numbers = self._ir.Constant(self._ir.VectorType(self._long, self.width), list(range(self.width)))
            self._mask = b.icmp_unsigned("<", numbers, self.spread(b.sub(count, whole)))
            yield whole
            self._mask = None

    def compiled(self) -> Loop:
        """The function, to be called with whole numbers."""
        self._b.ret_void()
        code = self._llvm.parse_assembly(str(self._module))
        code.verify()
        options = self._llvm.create_pipeline_tuning_options(speed_level=2)
        passes = self._llvm.create_pass_builder(self._machine, options)
        passes.getModulePassManager().run(code, passes)
        engine = self._llvm.create_mcjit_compiler(code, self._machine)
        engine.finalize_object()
        _owners.append(engine)
        arguments = [ctypes.c_void_p if kind == self._pointer else ctypes.c_int64 for kind in self._kinds]
        return ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(self._b.function.name))

    def _call(self, name: str, kind: Any, kinds: list[Any], given: list[Any]) -> Any:
        """A call of one of LLVM's own functions."""
        name = f"llvm.{name}"
        function = self._module.globals.get(name)
        if function is None:
            function = self._ir.Function(self._module, self._ir.FunctionType(kind, kinds), name)
        return self._b.call(function, given, fastmath=FAST if kind == self._one else ())
