"""What `coding.py` says, as machine code for this processor: one pass over a tensor."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from torch import Tensor

from ..machine_code import ADDRESS, FLOAT, INDEX, compile_module, load, loop, number, place_of
from .coding import LARGEST, PIECE, Coded, Plan, Seen, compare

_INT, _BYTE, _BOOL = ir.IntType(32), ir.IntType(8), ir.IntType(1)

_GOLDEN = 0x9E3779B9


class NativeCoder:
    """Codes tensors in this processor's memory. Other threads of the interpreter run meanwhile.

    Args:
        seed: Of the draws.

    Raises:
        RuntimeError: LLVM can make no code for this processor.
    """

    def __init__(self, seed: int) -> None:
        self._draws = np.random.default_rng(seed)
        for bits in (4, 8):
            _code(bits)

    def encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: np.ndarray, into: Coded) -> bool:
        encode, _ = _code(plan.bits)
        seed = int(self._draws.integers(2**32))
        numbers = (plan.numel, plan.pieces_each, seed)
        return not encode(*_addresses(values, steps, factors, into.sums, into.words), *numbers)

    def decode(
        self, plan: Plan, coded: Coded, steps: np.ndarray, factors: np.ndarray, mine: Tensor, into: Tensor
    ) -> Seen:
        _, decode = _code(plan.bits)
        seen = Seen(*(np.zeros(plan.parts, dtype=kind) for kind in (np.float32, np.float32, np.int32)))
        found = (seen.farthest, seen.largest, seen.wrong)
        decode(*_addresses(mine, steps, factors, coded.sums, coded.words, into, *found), plan.numel, plan.pieces_each)
        return seen

    def compare(self, plan: Plan, theirs: Tensor, mine: Tensor) -> Seen:
        return compare(plan, theirs, mine)


def _addresses(*places: Tensor | np.ndarray) -> list[int]:
    return [place.data_ptr() if isinstance(place, Tensor) else place.ctypes.data for place in places]


@functools.cache
def _code(bits: int) -> tuple[Callable[..., int], Callable[..., None]]:
    """The functions that encode and decode a tensor."""
    address_of = compile_module(_module(bits))
    encode = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
    decode = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 9, ctypes.c_int64, ctypes.c_int64)
    return encode(address_of("encode")), decode(address_of("decode"))


def _module(bits: int) -> ir.Module:
    module = ir.Module(f"coding_{bits}")
    _Encoding(module, bits).build()
    _Decoding(module, bits).build()
    return module


class _Pass:
    """A function that goes over a tensor, piece by piece, and over the numbers of a piece.

    Its first arguments are the places of the numbers, the steps, the factors, the sums and the words; its last ones the
    number of numbers and of pieces for each step.
    """

    name: str
    result: Any
    places: int
    more: tuple[Any, ...] = ()

    def __init__(self, module: ir.Module, bits: int) -> None:
        kinds = [*[ADDRESS] * self.places, INDEX, INDEX, *self.more]
        function = ir.Function(module, ir.FunctionType(self.result, kinds), self.name)
        for place in function.args[: self.places]:
            place.add_attribute("noalias")
        self.args = function.args
        self.values, self.steps, self.factors, self.sums, self.words = function.args[:5]
        self.numel, self.pieces_each = function.args[self.places : self.places + 2]
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.bits = bits
        self.intrinsics = {
            name: module.declare_intrinsic(f"llvm.{name}", [FLOAT]) for name in ("floor", "rint", "fabs")
        }
        self.sum = self.builder.alloca(INDEX)

    def call(self, name: str, value: Any) -> Any:
        return self.builder.call(self.intrinsics[name], [value])

    def build(self) -> None:
        b = self.builder
        self.begin()
        pieces = b.sdiv(b.add(self.numel, number(PIECE - 1)), number(PIECE))
        with loop(b, pieces) as piece:
            self.part = b.sdiv(piece, self.pieces_each)
            self.step = load(b, FLOAT, self.steps, self.part)
            self.inverse = b.fdiv(ir.Constant(FLOAT, 1.0), self.step)
            first = b.mul(piece, number(PIECE))
            left = b.sub(self.numel, first)
            numbers = b.select(b.icmp_signed("<", left, number(PIECE)), left, number(PIECE))
            b.store(number(0), self.sum)
            self.begin_piece()
            self.pass_piece(first, numbers)
            self.end_piece(piece)
        self.end()

    def add_to_sum(self, count: Any, index: Any) -> None:
        b = self.builder
        factor = b.sext(load(b, _INT, self.factors, index), INDEX)
        b.store(b.add(b.load(self.sum, typ=INDEX), b.mul(b.sext(count, INDEX), factor)), self.sum)

    def is_below(self, value: Any, limit: int) -> Any:
        """Of its size; a nan is not."""
        return self.builder.fcmp_ordered("<", self.call("fabs", value), ir.Constant(FLOAT, float(limit)))

    def to_count(self, value: Any, fits: Any) -> Any:
        b = self.builder
        return b.fptosi(b.select(fits, value, ir.Constant(FLOAT, 0.0)), _INT)

    def begin(self) -> None:
        """Before the first piece."""

    def begin_piece(self) -> None:
        """Before the first number of a piece."""

    def pass_piece(self, first: Any, numbers: Any) -> None:
        """So many numbers, from this one on."""
        raise NotImplementedError

    def end_piece(self, piece: Any) -> None:
        """After its last number."""
        raise NotImplementedError

    def end(self) -> None:
        """After the last piece."""
        raise NotImplementedError


class _Encoding(_Pass):
    """`encode(values, steps, factors, sums, words, numel, pieces_each, seed)`: 0, or 1 if some number does not fit."""

    name, result, places, more = "encode", _INT, 5, (_INT,)

    def begin(self) -> None:
        self.seed = self.args[-1]
        self.misfits = self.builder.alloca(_INT)
        self.builder.store(number(0, _INT), self.misfits)

    def pass_piece(self, first: Any, numbers: Any) -> None:
        b = self.builder
        if self.bits == 8:
            with loop(b, numbers) as index:
                self.store_word(b.add(first, index), self.count(first, index))
            return
        words, half, pairs = b.lshr(first, number(1)), _half(b, numbers), b.lshr(numbers, number(1))
        with loop(b, pairs) as index:
            low, high = self.count(first, index), self.count(first, b.add(index, half))
            word = b.or_(b.and_(low, number(15, _INT)), b.shl(high, number(4, _INT)))
            self.store_word(b.add(words, index), word)
        with b.if_then(b.icmp_signed("<", pairs, half)):  # one is left in the middle
            self.store_word(b.add(words, pairs), b.and_(self.count(first, pairs), number(15, _INT)))

    def store_word(self, at: Any, word: Any) -> None:
        self.builder.store(self.builder.trunc(word, _BYTE), place_of(self.builder, _BYTE, self.words, at))

    def count(self, first: Any, index: Any) -> Any:
        """Of a number, by its place in the piece; it is added to the sum."""
        b = self.builder
        at = b.add(first, index)
        scaled = b.fmul(load(b, FLOAT, self.values, at), self.inverse)
        below = self.call("floor", scaled)
        goes_up = b.fcmp_ordered("<", self.draw(at), b.fsub(scaled, below))
        rounded = b.select(goes_up, b.fadd(below, ir.Constant(FLOAT, 1.0)), below)
        fits = self.is_below(rounded, LARGEST)
        b.store(b.or_(b.load(self.misfits, typ=_INT), b.zext(b.not_(fits), _INT)), self.misfits)
        count = self.to_count(rounded, fits)
        self.add_to_sum(count, index)
        return count

    def draw(self, at: Any) -> Any:
        """From 0 up to 1, of 24 bits: a hash of the index (`lowbias32` of Ch. Wellons' hash prospector)."""
        b = self.builder
        x = b.add(b.mul(b.trunc(at, _INT), number(_GOLDEN, _INT)), self.seed)
        for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = b.mul(b.xor(x, b.lshr(x, number(shift, _INT))), number(multiplier, _INT))
        x = b.xor(x, b.lshr(x, number(15, _INT)))
        return b.fmul(b.sitofp(b.lshr(x, number(8, _INT)), FLOAT), ir.Constant(FLOAT, 2.0**-24))

    def end_piece(self, piece: Any) -> None:
        b = self.builder
        b.store(b.load(self.sum, typ=INDEX), place_of(b, INDEX, self.sums, piece))

    def end(self) -> None:
        self.builder.ret(self.builder.load(self.misfits, typ=_INT))


class _Decoding(_Pass):
    """`decode(mine, steps, factors, sums, words, into, farthest, largest, wrong, numel, pieces_each)`."""

    name, result, places = "decode", ir.VoidType(), 9

    def begin(self) -> None:
        b = self.builder
        self.into, *self.found, self.wrong = self.args[5:9]
        self.extremes = [b.alloca(_INT) for _ in self.found]
        self.misfits = b.alloca(_INT)

    def begin_piece(self) -> None:
        for place in (*self.extremes, self.misfits):
            self.builder.store(number(0, _INT), place)

    def pass_piece(self, first: Any, numbers: Any) -> None:
        b = self.builder
        if self.bits == 8:
            with loop(b, numbers) as index:
                self.number(self.word(b.add(first, index)), first, index)
            return
        words, half = b.lshr(first, number(1)), _half(b, numbers)
        with loop(b, half) as index:  # by themselves, so that stores follow each other
            self.number(b.and_(self.word(b.add(words, index)), number(15, _INT)), first, index)
        with loop(b, b.sub(numbers, half)) as index:
            word = b.lshr(self.word(b.add(words, index)), number(4, _INT))
            self.number(word, first, b.add(index, half))

    def word(self, at: Any) -> Any:
        return self.builder.zext(load(self.builder, _BYTE, self.words, at), _INT)

    def number(self, word: Any, first: Any, index: Any) -> None:
        """Find and store one, by its place in the piece."""
        b, span, at = self.builder, 2.0**self.bits, self.builder.add(first, index)
        mine, low = load(b, FLOAT, self.values, at), b.sitofp(word, FLOAT)
        away = b.fmul(b.fsub(b.fmul(mine, self.inverse), low), ir.Constant(FLOAT, 1 / span))
        nearest = b.fadd(low, b.fmul(self.call("rint", away), ir.Constant(FLOAT, span)))
        fits = self.is_below(nearest, 2 * LARGEST)
        b.store(b.or_(b.load(self.misfits, typ=_INT), b.zext(b.not_(fits), _INT)), self.misfits)
        count = self.to_count(nearest, fits)
        self.add_to_sum(count, index)
        value = b.fmul(b.sitofp(count, FLOAT), self.step)
        b.store(value, place_of(b, FLOAT, self.into, at))
        for extreme, size in zip(self.extremes, (b.fsub(value, mine), value), strict=True):
            # Of numbers without a sign the larger one has the larger bits.
            bits, before = b.bitcast(self.call("fabs", size), _INT), b.load(extreme, typ=_INT)
            b.store(b.select(b.icmp_signed(">", bits, before), bits, before), extreme)

    def end_piece(self, piece: Any) -> None:
        b = self.builder
        for extreme, place in zip(self.extremes, self.found, strict=True):
            at, bits = place_of(b, _INT, place, self.part), b.load(extreme, typ=_INT)
            before = b.load(at, typ=_INT)
            b.store(b.select(b.icmp_signed(">", bits, before), bits, before), at)
        is_other = b.icmp_signed("!=", b.load(self.sum, typ=INDEX), load(b, INDEX, self.sums, piece))
        is_wrong = b.or_(b.zext(is_other, _INT), b.load(self.misfits, typ=_INT))
        at = place_of(b, _INT, self.wrong, self.part)
        b.store(b.add(b.load(at, typ=_INT), is_wrong), at)

    def end(self) -> None:
        self.builder.ret_void()


def _half(builder: ir.IRBuilder, numbers: Any) -> Any:
    """Bytes that hold so many numbers of 4 bits."""
    return builder.lshr(builder.add(numbers, number(1)), number(1))
