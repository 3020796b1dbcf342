import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.processes import environment
from trainer.errors import Preempted
from trainer.stop import StopRequest


@pytest.mark.parametrize('number', StopRequest.signals)
def test_a_signal_becomes_a_request_and_nothing_else(number):
    with contextlib.suppress(Preempted), StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        raise Preempted


def test_a_signal_that_nobody_has_answered_is_raised_again():
    seen = []
    mine = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_the_handlers_of_before_are_back_afterwards():
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = [signal.getsignal(number) for number in StopRequest.signals]
        with contextlib.suppress(Preempted), StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            raise Preempted
        assert [signal.getsignal(number) for number in StopRequest.signals] == before
        with pytest.raises(RuntimeError), StopRequest():
            raise RuntimeError
        assert [signal.getsignal(number) for number in StopRequest.signals] == before
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_the_next_run_of_the_process_has_a_request_of_its_own():
    with contextlib.suppress(Preempted), StopRequest() as first:
        os.kill(os.getpid(), signal.SIGTERM)
        raise Preempted
    with StopRequest() as second:
        pass
    assert (first.requested, second.requested) == (True, False)


@pytest.mark.parametrize('number', StopRequest.signals)
def test_a_second_signal_ends_the_process_at_once(number):
    program = f"""
import os, time
from trainer.stop import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), {number.value})
    assert stop.requested
    print('still there', flush=True)
    os.kill(os.getpid(), {number.value})
    time.sleep(60)
    print('and still there')
"""
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-number, 'still there\n')


def test_outside_the_main_thread_it_is_silently_without_effect():
    seen = []

    def use():
        with StopRequest() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before
