"""Loops that torch has no good operation for, compiled by LLVM for this processor when they are first used.

They need llvmlite (`pip install "alloy-lm[cpu]"`), take addresses and run on one core. Compiling takes some 50 ms.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

# rows and outputs that are computed together: as many sums as leave registers for what they are made of
TILE = 4
# sums may be reordered and products joined to them; NaN and infinity keep their meaning
FAST = ("reassoc", "contract", "nsz")
# code lives as long as what owns it
_owners: list[Any] = []


@cache
def few_rows() -> Callable[..., None] | None:
    """y = x w^T, called with the addresses of x (rows, inputs), w (outputs, inputs) and y (rows, outputs), all fp32 and
    contiguous, then rows, outputs and inputs; None where nothing can be compiled.

    Weights are read once from memory, in order, four rows of them at a time, each as they meet the rows of x.
    """
    return Compiler().few_rows() if find_spec("llvmlite") is not None else None


class Compiler:
    """Builds functions for this processor; `width` is of its vectors, in numbers of 32 bits."""

    def __init__(self, width: int | None = None) -> None:
        from llvmlite import binding, ir

        self.ir: Any = ir
        self.llvm: Any = binding
        self.llvm.initialize_native_target()
        self.llvm.initialize_native_asmprinter()
        features: Any = self.llvm.get_host_cpu_features()
        self.machine: Any = self.llvm.Target.from_default_triple().create_target_machine(
            cpu=self.llvm.get_host_cpu_name(), features=features.flatten(), opt=3
        )
        self.width = width or (16 if features.get("avx512f") else 8 if features.get("avx2") else 4)
        self.long, self.pointer = ir.IntType(64), ir.PointerType()
        self.vector: Any = ir.VectorType(ir.FloatType(), self.width)

    def few_rows(self) -> Callable[..., None]:
        """See the function of this name."""
        ir, long = self.ir, self.long
        module = ir.Module()
        module.triple = self.machine.triple
        kind = ir.FunctionType(ir.VoidType(), [self.pointer] * 3 + [long] * 3)
        function = ir.Function(module, kind, "few_rows")
        x, w, y, rows, outputs, inputs = function.args
        b = ir.IRBuilder(function.append_basic_block())
        last = [b.sub(count, long(1)) for count in (rows, outputs)]
        # the last vector of a row may be a part of one
        whole = b.and_(inputs, long(-self.width))
        lanes = ir.Constant(ir.VectorType(long, self.width), list(range(self.width)))
        left = self._spread(b, b.sub(inputs, whole))
        rest = b.icmp_unsigned("<", lanes, left)
        sums = [[b.alloca(self.vector) for _ in range(TILE)] for _ in range(TILE)]
        with self._range(b, outputs, TILE) as n, self._range(b, rows, TILE) as m:
            # what is not there is the last once more: it gets the same value
            tiles = [
                [self._least(b, b.add(i, long(j)), end) for j in range(TILE)]
                for i, end in zip((m, n), last, strict=True)
            ]
            x_rows, w_rows = (
                [self._at(b, base, b.mul(i, inputs)) for i in tile] for base, tile in zip((x, w), tiles, strict=True)
            )
            for place in (place for line in sums for place in line):
                b.store(ir.Constant(self.vector, None), place)

            def add(k: Any, read: Callable[[Any], Any]) -> None:
                left, right = ([read(self._at(b, row, k)) for row in side] for side in (x_rows, w_rows))
                for line, one in zip(sums, left, strict=True):
                    for place, other in zip(line, right, strict=True):
                        product = b.fmul(one, other, flags=FAST)
                        b.store(b.fadd(b.load(place, typ=self.vector), product, flags=FAST), place)

            with self._range(b, whole, self.width) as k:
                add(k, lambda at: b.load(at, typ=self.vector, align=4))
            with b.if_then(b.icmp_signed("<", whole, inputs)):
                add(whole, lambda at: self._read_part(b, module, at, rest))
            for i, line in zip(tiles[0], sums, strict=True):
                for j, place in zip(tiles[1], line, strict=True):
                    total = self._sum(b, module, b.load(place, typ=self.vector))
                    b.store(total, self._at(b, y, b.add(b.mul(i, outputs), j)))
        b.ret_void()
        return self._compile(module, "few_rows", kind)

    def _spread(self, b: Any, value: Any) -> Any:
        """A vector of one number."""
        kind = self.ir.VectorType(value.type, self.width)
        first = b.insert_element(self.ir.Constant(kind, self.ir.Undefined), value, self.ir.IntType(32)(0))
        return b.shuffle_vector(
            first, first, self.ir.Constant(self.ir.VectorType(self.ir.IntType(32), self.width), None)
        )

    def _at(self, b: Any, base: Any, index: Any) -> Any:
        """The address of a number."""
        return b.gep(base, [index], source_etype=self.ir.FloatType())

    def _least(self, b: Any, one: Any, other: Any) -> Any:
        return b.select(b.icmp_signed("<", one, other), one, other)

    def _read_part(self, b: Any, module: Any, at: Any, mask: Any) -> Any:
        """A vector whose numbers outside `mask` are 0 and not read."""
        ir = self.ir
        name = f"llvm.masked.load.v{self.width}f32.p0"
        kind = ir.FunctionType(self.vector, [self.pointer, ir.IntType(32), mask.type, self.vector])
        fn = module.globals.get(name) or ir.Function(module, kind, name)
        return b.call(fn, [at, ir.IntType(32)(4), mask, ir.Constant(self.vector, None)])

    def _sum(self, b: Any, module: Any, value: Any) -> Any:
        """The sum of a vector."""
        ir = self.ir
        name = f"llvm.vector.reduce.fadd.v{self.width}f32"
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), self.vector])
        fn = module.globals.get(name) or ir.Function(module, kind, name)
        return b.call(fn, [ir.FloatType()(0.0), value], fastmath=FAST)

    @contextmanager
    def _range(self, b: Any, stop: Any, step: int) -> Iterator[Any]:
        """A loop over 0, step, ... below `stop`; the block of the `with` is its body."""
        function, before = b.function, b.block
        head, body, end = (function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(self.long)
        i.add_incoming(self.long(0), before)
        b.cbranch(b.icmp_signed("<", i, stop), body, end)
        b.position_at_end(body)
        yield i
        i.add_incoming(b.add(i, self.long(step)), b.block)
        b.branch(head)
        b.position_at_end(end)

    def _compile(self, module: Any, name: str, kind: Any) -> Callable[..., None]:
        code = self.llvm.parse_assembly(str(module))
        code.verify()
        options = self.llvm.create_pipeline_tuning_options(speed_level=2)
        builder = self.llvm.create_pass_builder(self.machine, options)
        builder.getModulePassManager().run(code, builder)
        engine = self.llvm.create_mcjit_compiler(code, self.machine)
        engine.finalize_object()
        arguments = [ctypes.c_void_p if t == self.pointer else ctypes.c_int64 for t in kind.args]
        function = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name))
        _owners.append(engine)
        return function
