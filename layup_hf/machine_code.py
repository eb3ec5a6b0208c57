"""Machine code for this processor, made by LLVM when it is needed.

llvmlite is LLVM in a wheel: no compiler, no header and no cache is needed, and it takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

FLOAT, INDEX, ADDRESS = ir.FloatType(), ir.IntType(64), ir.PointerType()

_engines: list[Any] = []  # they own the code, which is in use as long as the process lives


def compile_module(module: ir.Module) -> Any:
    """Machine code of a module, with all that this processor can; asked for a function's address by its name.

    Raises:
        RuntimeError: LLVM can make no code for this processor.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = llvm.create_mcjit_compiler(parsed, machine)  # each owns its machine
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address


def number(value: int, kind: Any = INDEX) -> Any:
    """A constant."""
    return ir.Constant(kind, value)


def place_of(builder: ir.IRBuilder, kind: Any, place: Any, index: Any) -> Any:
    """Address of an element of an array."""
    return builder.gep(place, [index], source_etype=kind)


def load(builder: ir.IRBuilder, kind: Any, place: Any, index: Any) -> Any:
    """An element of an array."""
    return builder.load(place_of(builder, kind, place, index), typ=kind)


@contextlib.contextmanager
def loop(builder: ir.IRBuilder, count: Any) -> Iterator[Any]:
    """What is built inside runs for each index from 0 up to `count`."""
    before = builder.block
    head, body, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INDEX)
    index.add_incoming(number(0), before)
    builder.cbranch(builder.icmp_signed("<", index, count), body, after)
    builder.position_at_end(body)
    yield index
    following = builder.add(index, number(1), flags=("nsw",))
    index.add_incoming(following, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
