"""Answers that are asked for in advance: in their order, and as many as it takes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fleet import wait_until

from layup_hf.progress.ahead import Ahead


class Question:
    """Answered with 0, 1, 2 and so on; each answer may be held back."""

    def __init__(self):
        self.asked = 0
        self.answered = 0
        self._free = threading.Semaphore(0)
        self.is_open = True

    def __call__(self):
        number, self.asked = self.asked, self.asked + 1
        if not self.is_open:
            assert self._free.acquire(timeout=20)
        self.answered += 1
        return number

    def answer(self, count=1):
        self._free.release(count)


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def take_late(ahead, question):
    """Take an answer that comes only after it was waited for."""
    threading.Timer(0.1, question.answer).start()
    return ahead.take()


def test_answers_come_in_their_order(executor):
    question = Question()
    ahead = Ahead(question, executor)
    assert [ahead.take() for _ in range(50)] == list(range(50))


def test_one_answer_is_on_its_way_while_none_is_late(executor):
    question = Question()
    ahead = Ahead(question, executor)
    assert question.asked == 0  # before anybody has asked
    for number in range(20):
        assert ahead.take() == number
        wait_until(lambda number=number: question.answered == number + 2, "the next one")
    time.sleep(0.05)
    assert question.asked == 21
    assert ahead.held() == [20]


def test_as_many_are_asked_for_as_answers_were_late_up_to_most(executor):
    question = Question()
    ahead = Ahead(question, executor, most=3)
    question.is_open = False
    question.answer()
    assert ahead.take() == 0  # the first is asked for when it is needed: that it is late tells nothing
    numbers, depths = [], []
    for _ in range(4):
        numbers.append(take_late(ahead, question))
        depths.append(len(ahead._asked))
    assert numbers == [1, 2, 3, 4]
    assert depths == [2, 3, 3, 3]
    question.answer(10)
    assert ahead.held() == [5, 6, 7]


def test_more_are_asked_for_only_when_an_answer_is_late(executor):
    question = Question()
    ahead = Ahead(question, executor)
    question.is_open = False
    question.answer()
    ahead.take()
    assert take_late(ahead, question) == 1
    question.answer(100)
    for number in range(2, 30):
        wait_until(lambda: ahead._asked[0].done(), "an answer in time")
        assert ahead.take() == number
        assert len(ahead._asked) == 2


def test_what_is_held_stays_to_be_taken(executor):
    ahead = Ahead(Question(), executor)
    assert ahead.held() == []
    assert ahead.take() == 0
    assert ahead.held() == [1]
    assert ahead.held() == [1]
    assert [ahead.take(), ahead.take()] == [1, 2]


def test_while_an_answer_does_not_come_something_is_looked_after(executor):
    question, looks = Question(), []
    question.is_open = False

    def look():
        looks.append(time.monotonic())
        if len(looks) == 2:
            question.answer(2)

    assert Ahead(question, executor, while_waiting=look).take() == 0
    assert len(looks) == 2
    assert looks[1] - looks[0] > 0.9  # about once in a second


def test_who_looks_may_end_the_waiting(executor):
    question = Question()
    question.is_open = False

    def give_up():
        raise ConnectionError("nobody there")

    ahead = Ahead(question, executor, while_waiting=give_up)
    with pytest.raises(ConnectionError, match="nobody there"):
        ahead.take()
    question.answer()


def test_waiting_for_what_is_held_can_be_ended_as_well(executor):
    question = Question()
    looks = []

    def give_up():
        looks.append(None)
        raise ConnectionError("nobody there")

    ahead = Ahead(question, executor, while_waiting=give_up)
    question.is_open = False
    question.answer()
    ahead.take()
    with pytest.raises(ConnectionError, match="nobody there"):
        ahead.held()
    assert len(looks) == 1
    question.answer(10)


@pytest.mark.parametrize("error", [RuntimeError("the store is gone"), TimeoutError("the store is silent")])
def test_an_answer_that_is_an_exception_comes_in_its_turn(executor, error):
    """A time-out of the question is not taken for an answer that is still to come."""
    asked = []

    def ask():
        asked.append(None)
        if len(asked) == 3:
            raise error
        return len(asked)

    ahead = Ahead(ask, executor)
    assert [ahead.take(), ahead.take()] == [1, 2]
    with pytest.raises(type(error), match=str(error)):
        ahead.take()
