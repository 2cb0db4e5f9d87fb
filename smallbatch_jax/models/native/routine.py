"""Machine code for the processor at hand: loops over vectors of float32, written here and compiled by LLVM.

XLA:CPU takes what it cannot fuse from libraries, and what these do not do well it does slowly. A `Routine` is a function of
pointers to float32 arrays in which the innermost loops are written out by hand: which numbers stay in registers is decided
where it is written, not left to a compiler's heuristics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from smallbatch_jax.models.native.processor import WIDE, Processor

INTEGER, FLAG, FLOAT, POINTER = ir.IntType(64), ir.IntType(32), ir.FloatType(), ir.PointerType()

Value = Any  # of LLVM's
Index = Any  # an integer of LLVM's, or one known already


class Routine:
    """A function that is being written, of two integers and pointers to float32; it gives nothing back.

    Numbers known while it is written may be given wherever an integer is asked for.
    """

    def __init__(self, name: str, pointers: int, processor: Processor):
        self.processor = processor
        self.vector = ir.VectorType(FLOAT, processor.lanes)
        self.module = ir.Module(name)
        arguments = [INTEGER] * 2 + [POINTER] * pointers
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.build = ir.IRBuilder(self.function.append_basic_block("entry"))
        of_vectors = ir.FunctionType(self.vector, [self.vector] * 3)
        self._fma = ir.Function(self.module, of_vectors, f"llvm.fma.v{processor.lanes}f32")
        self.zeros = ir.Constant(self.vector, [0.0] * processor.lanes)

    @property
    def arguments(self) -> tuple[Value, ...]:
        return self.function.args

    @contextmanager
    def loop(self, start: Index, stop: Index, step: int = 1) -> Iterator[Value]:
        """Once for each integer from start to below stop."""
        before, head = self.build.block, self.function.append_basic_block("head")
        body, after = self.function.append_basic_block("body"), self.function.append_basic_block("after")
        self.build.branch(head)
        self.build.position_at_end(head)
        index: Any = self.build.phi(INTEGER)
        index.add_incoming(integer(start), before)
        self.build.cbranch(self.build.icmp_signed("<", index, integer(stop)), body, after)
        self.build.position_at_end(body)
        yield index
        index.add_incoming(self.sum(index, step), self.build.block)
        self.build.branch(head)
        self.build.position_at_end(after)

    def sum(self, *terms: Index) -> Value:
        total = integer(terms[0])
        for term in terms[1:]:
            total = self.build.add(total, integer(term))
        return total

    def difference(self, a: Index, b: Index) -> Value:
        return self.build.sub(integer(a), integer(b))

    def product(self, a: Index, b: Index) -> Value:
        return self.build.mul(integer(a), integer(b))

    def quotient(self, a: Index, b: Index) -> Value:
        return self.build.sdiv(integer(a), integer(b))

    def ceiling(self, a: Index, divisor: int) -> Value:
        """⌈a / divisor⌉ where that is not negative, and something below 1 where it is."""
        return integer(a) if divisor == 1 else self.quotient(self.sum(a, divisor - 1), divisor)

    def least(self, a: Index, b: Index) -> Value:
        return self.build.select(self.build.icmp_signed("<", integer(a), integer(b)), integer(a), integer(b))

    def greatest(self, a: Index, b: Index) -> Value:
        return self.build.select(self.build.icmp_signed(">", integer(a), integer(b)), integer(a), integer(b))

    def at(self, pointer: Value, *offsets: Index) -> Value:
        """The pointer moved by the sum of the offsets, in numbers."""
        return self.build.gep(pointer, [self.sum(*offsets)], source_etype=FLOAT)

    def accumulator(self) -> Value:
        """A vector that may change, to be kept in a register."""
        with self.build.goto_entry_block():
            return self.build.alloca(self.vector)

    def get(self, accumulator: Value) -> Value:
        return self.build.load(accumulator, typ=self.vector)

    def set(self, accumulator: Value, vector: Value) -> None:
        self.build.store(vector, accumulator)

    def load(self, pointer: Value) -> Value:
        """The vector of numbers that begins there."""
        return self.build.load(pointer, align=4, typ=self.vector)

    def store(self, vector: Value, pointer: Value) -> None:
        self.build.store(vector, pointer, align=4)

    def spread(self, pointer: Value) -> Value:
        """A vector that holds the one number there in each of its lanes."""
        number = self.build.load(pointer, align=4, typ=FLOAT)
        first = self.build.insert_element(ir.Constant(self.vector, ir.Undefined), number, ir.Constant(FLAG, 0))
        nowhere = ir.Constant(ir.VectorType(FLAG, self.processor.lanes), None)
        return self.build.shuffle_vector(first, ir.Constant(self.vector, ir.Undefined), nowhere)

    def add(self, a: Value, b: Value) -> Value:
        """The sum of two vectors."""
        return self.build.fadd(a, b)

    def add_product(self, accumulator: Value, a: Value, b: Value) -> None:
        """accumulator += a·b, rounded once."""
        self.set(accumulator, self.build.call(self._fma, [a, b, self.get(accumulator)]))


def integer(value: Index) -> Value:
    return ir.Constant(INTEGER, value) if isinstance(value, int) else value


class Compiled(NamedTuple):
    """Machine code in memory, for as long as this is kept."""

    address: int
    engine: Any


def compiled(code: Routine, name: str) -> Compiled:
    """The function of that name in a routine's module."""
    code.build.ret_void()
    target = _target(code.processor)
    parsed = llvm.parse_assembly(str(code.module))
    parsed.verify()
    # Loops are written as they are to be: LLVM's own unrolling would only need more registers than there are.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.slp_vectorization = options.loop_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, target)
    engine.finalize_object()
    return Compiled(engine.get_function_address(name), engine)


def _target(processor: Processor) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if processor != WIDE:
        features.update({name: False for name in features if name.startswith("avx512")})
    flags = features.flatten() + ",-prefer-256-bit"
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=flags, opt=3, jit=True
    )
