"""The first SIGTERM asks all workers to save and end; the second one kills."""

import multiprocessing
import os
import signal

import pytest
from fleet import together
from transformers import TrainerControl, TrainerState, TrainingArguments

from layup_hf.trainer.preemption import PreemptionCallback


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def elsewhere():
    """Signals that a handler of somebody else got; a test that goes wrong must not end the others."""
    arrived = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def callback():
    callback = PreemptionCallback()
    yield callback
    callback.remove()


@pytest.fixture
def end_step(tmp_path):
    """What a callback asks for at the end of a step."""

    def end(callback, save_strategy="steps", **control):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy=save_strategy)
        control = callback.on_step_end(args, TrainerState(global_step=7), TrainerControl(**control))
        return control.should_save, control.should_training_stop

    return end


@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
def test_a_signal_asks_to_save_and_stop_after_the_step(save_strategy, callback, end_step, elsewhere, caplog):
    callback.install()
    assert end_step(callback, save_strategy) == (False, False)
    terminate()
    assert callback.is_requested
    assert elsewhere == []
    assert caplog.messages == []
    assert end_step(callback, save_strategy) == (True, True)
    (message,) = caplog.messages
    assert message == "Rank 0 got SIGTERM: all workers end after step 7, saving a checkpoint."
    assert callback.has_stopped


def test_where_nothing_is_to_be_saved_nothing_is_and_it_is_said(callback, end_step, caplog):
    callback.install()
    terminate()
    assert end_step(callback, "no") == (False, True)
    (message,) = caplog.messages
    assert "step 7, saving nothing, as `save_strategy` is 'no'" in message


def test_a_training_that_ends_anyway_is_left_alone(callback, end_step, caplog):
    callback.install()
    terminate()
    assert end_step(callback, should_training_stop=True) == (False, True)
    assert caplog.messages == []
    assert not callback.has_stopped


def test_without_a_signal_nothing_is_asked_for(callback, end_step):
    callback.install()
    assert end_step(callback) == (False, False)
    assert not callback.is_requested


@pytest.mark.parametrize("signals", [0, 1])
def test_the_signal_goes_back_to_whoever_had_it(signals, callback, elsewhere):
    before = signal.getsignal(signal.SIGTERM)
    callback.install()
    for _ in range(signals):
        terminate()
    callback.remove()
    assert signal.getsignal(signal.SIGTERM) is before
    terminate()
    assert elsewhere == [signal.SIGTERM]


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_that_nobody_handled_goes_back_too(handler, callback):
    signal.signal(signal.SIGTERM, handler)
    callback.install()
    callback.install()
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    callback.remove()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_installing_and_removing_twice_is_as_once(callback, elsewhere):
    before = signal.getsignal(signal.SIGTERM)
    callback.remove()
    assert signal.getsignal(signal.SIGTERM) is before
    callback.install()
    terminate()
    callback.install()
    assert callback.is_requested
    callback.remove()
    assert signal.getsignal(signal.SIGTERM) is before
    callback.remove()
    assert signal.getsignal(signal.SIGTERM) is before
    assert elsewhere == []


def test_a_later_training_does_not_feel_an_earlier_signal(callback):
    callback.install()
    terminate()
    callback.remove()
    assert callback.is_requested  # so the trainer can still tell why it ended
    callback.install()
    assert not callback.is_requested
    terminate()
    assert callback.is_requested


def test_another_thread_than_the_main_one_watches_for_nothing(callback, elsewhere):
    before = signal.getsignal(signal.SIGTERM)
    assert together([callback.install]) == [None]
    assert signal.getsignal(signal.SIGTERM) is before
    assert together([callback.remove]) == [None]
    terminate()
    assert elsewhere == [signal.SIGTERM]
    assert not callback.is_requested


def _get_signals(number, alive):
    callback = PreemptionCallback()
    callback.install()
    for _ in range(number):
        terminate()
        alive.value += callback.is_requested


@pytest.mark.parametrize(("signals", "survived", "exit_code"), [(1, 1, 0), (2, 1, -signal.SIGTERM)])
def test_the_second_signal_kills(signals, survived, exit_code):
    context = multiprocessing.get_context("fork")
    alive = context.Value("i", 0)
    process = context.Process(target=_get_signals, args=(signals, alive))
    process.start()
    process.join()
    assert (alive.value, process.exitcode) == (survived, exit_code)
