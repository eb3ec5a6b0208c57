"""Machine code that is made while a process runs."""

import ctypes

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from llvmlite import ir

from layup_hf.machine_code import ADDRESS, FLOAT, INDEX, compile_module, load, loop, number, place_of


@pytest.mark.parametrize("count", [0, 1, 33])
def test_a_loop_runs_over_an_array(count):
    module = ir.Module("test")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS, INDEX]), "double")
    values, length = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    with loop(builder, length) as index:
        value = builder.fmul(load(builder, FLOAT, values, index), ir.Constant(FLOAT, 2.0))
        builder.store(value, place_of(builder, FLOAT, values, builder.add(index, number(0))))
    builder.ret_void()
    double = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(compile_module(module)("double"))
    array = np.arange(40, dtype=np.float32)
    double(array.ctypes.data, count)
    assert array[:count].tolist() == [2.0 * n for n in range(count)]
    assert array[count:].tolist() == list(range(count, 40))


def test_what_is_no_code_is_refused():
    module = ir.Module("test")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "unended")
    function.append_basic_block()
    with pytest.raises(RuntimeError):
        compile_module(module)
