"""The one pass on a CPU: machine code for this processor, made when training begins."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from llvmlite import ir

from ..machine_code import ADDRESS, FLOAT, INDEX, compile_module, load, loop, number
from .arithmetic import stepped, towards
from .table import BY_ROW, BYTES, PEERS, Column, Scalar, Table

_LEAST = 1 << 16
"""Numbers that are worth a thread of their own."""

_EXACT = ("contract",)  # a product and a sum may be rounded once
_SUM = ("contract", "reassoc")  # terms may be added in any order


class NativePass:
    """Steps blocks on this processor.

    Other threads of the interpreter run meanwhile.

    Raises:
        RuntimeError: LLVM can make no code for this processor.
    """

    name = "by machine code for this processor"

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        _code(0, False)

    def run(self, table: Table) -> None:
        """Make the step that the table says, by as many threads as torch has."""
        code = _code(table.merges, table.compares)
        if table.factor is not None:
            table.scalars[:, Scalar.FACTOR] = float(table.factor)
        parts = table.shared_out(max(1, min(torch.get_num_threads(), table.numel // _LEAST)))
        if len(parts) > 1 and self._threads is None:
            self._threads = ThreadPoolExecutor(torch.get_num_threads() - 1, "layup-step")
        others = [self._threads.submit(_call, code, part) for part in parts[1:]] if self._threads is not None else []
        _call(code, parts[0])
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown()
        self._threads = None


@functools.cache  # for the process: so nothing frees code that is in use
def _code(merges: int, compares: bool) -> Callable[[int, int, int], None]:
    """The function that takes the number of tensors, their addresses and their scalars."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    return kind(compile_module(_module(merges, compares))("step_block"))


def _call(code: Callable[[int, int, int], None], table: Table) -> None:
    addresses, scalars = table.addresses, table.scalars  # contiguous, each
    code(len(addresses), addresses.ctypes.data, scalars.ctypes.data)


def _module(merges: int, compares: bool) -> ir.Module:
    """`step_block(tensors, addresses, scalars)`, which calls `step_row` for every row of every tensor."""
    module = ir.Module("one_pass")
    row = _step_row(module, merges, compares)
    kind = ir.FunctionType(ir.VoidType(), [INDEX, ADDRESS, ADDRESS])
    function = ir.Function(module, kind, "step_block")
    count, addresses, scalars = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    with loop(builder, count) as tensor:
        words = builder.mul(tensor, ir.Constant(INDEX, Table.columns(merges)))
        its = [load(builder, INDEX, addresses, builder.add(words, number(c))) for c in range(Table.columns(merges))]
        floats = builder.mul(tensor, ir.Constant(INDEX, Table.numbers(merges)))
        its_scalars = builder.gep(scalars, [floats], source_etype=FLOAT)
        rows, width = its[Column.ROWS], its[Column.WIDTH]
        with loop(builder, rows) as row_number:
            of_row = builder.mul(builder.mul(row_number, width), number(BYTES))
            of_rows = builder.mul(row_number, number(BYTES))
            places = []
            for column, address in enumerate(its):
                if column not in (Column.ROWS, Column.WIDTH):
                    offset = of_rows if column in BY_ROW else of_row
                    places.append(builder.inttoptr(builder.add(address, offset), ADDRESS))
            builder.call(row, [width, its_scalars, *places])
    builder.ret_void()
    return module


def _step_row(module: ir.Module, merges: int, compares: bool) -> ir.Function:
    """`step_row(width, scalars, places...)`, with the places in the order of `Column` and then of the peers."""
    places = Table.columns(merges) - 2
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INDEX, ADDRESS, *[ADDRESS] * places]), "step_row")
    function.linkage = "internal"
    function.attributes.add("noinline")
    width, scalars, *places = function.args
    for place in places:
        place.add_attribute("noalias")  # peers may write theirs meanwhile, and each number is read once
    builder = ir.IRBuilder(function.append_basic_block())
    sums = [builder.alloca(FLOAT) for _ in range(2)]
    for total in sums:
        builder.store(ir.Constant(FLOAT, 0.0), total)

    def element(place: Any, index: Any) -> _Float:
        return _Float(builder, load(builder, FLOAT, place, index))

    factor, ahead_share, first_share, second_share, rate, decay, root_scale, epsilon, *weights = (
        element(scalars, number(scalar)) for scalar in range(Table.numbers(merges))
    )
    length = element(places[Column.LENGTH], number(0))
    root = module.declare_intrinsic("llvm.sqrt", [FLOAT])
    with loop(builder, width) as index:
        value, gradient, first, second = (element(places[column], index) for column in range(4))
        for peer, weight in enumerate(weights):
            value = towards(value, element(places[PEERS - 2 + peer], index), weight)
        gradient = gradient * factor
        if compares:
            difference = first - element(places[Column.THEIR_FIRST], index)
            for total, term in zip(sums, (difference * difference, second), strict=True):
                builder.store(builder.fadd(builder.load(total, typ=FLOAT), term.value, flags=_SUM), total)
        ahead = towards(first, gradient, ahead_share)
        first = towards(first, gradient, first_share)
        second = towards(second, gradient * gradient, second_share)
        of_second = _Float(builder, builder.call(root, [second.value]))
        value = stepped(value, ahead, of_second, length, rate, decay, root_scale, epsilon)
        for column, new in ((Column.VALUE, value), (Column.FIRST, first), (Column.SECOND, second)):
            builder.store(new.value, builder.gep(places[column], [index], source_etype=FLOAT))
    if compares:
        for total, column in zip(sums, (Column.SQUARE, Column.SECOND_OF_ROW), strict=True):
            builder.store(builder.fdiv(builder.load(total, typ=FLOAT), builder.sitofp(width, FLOAT)), places[column])
    builder.ret_void()
    return function


class _Float:
    """A float of the code that is being made."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: _Float) -> _Float:
        return _Float(self.builder, self.builder.fadd(self.value, other.value, flags=_EXACT))

    def __sub__(self, other: _Float) -> _Float:
        return _Float(self.builder, self.builder.fsub(self.value, other.value, flags=_EXACT))

    def __mul__(self, other: _Float) -> _Float:
        return _Float(self.builder, self.builder.fmul(self.value, other.value, flags=_EXACT))

    def __truediv__(self, other: _Float) -> _Float:
        return _Float(self.builder, self.builder.fdiv(self.value, other.value, flags=_EXACT))
