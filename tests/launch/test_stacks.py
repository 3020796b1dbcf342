"""Who hangs, from dumps as `faulthandler` writes them."""

import faulthandler
import threading

import pytest

from launch.stacks import blame, threads

IN_TENSORFLOW = """
Current thread 0x00007f258a01ab80 (most recent call first):
  File "/lib/tensorflow/python/eager/execute.py", line 53 in quick_execute
  File "/my/train.py", line 253 in train
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
IN_PYTHON = """
Current thread 0x00007f258a01ab80 (most recent call first):
  File "/my/metric.py", line 3 in slow
  File "/my/train.py", line 253 in train
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
READING = """
Thread 0x00007ff822fad6c0 (most recent call first):
  File "/my/data.py", line 10 in look
  File "/lib/tensorflow/python/ops/script_ops.py", line 269 in __call__

Thread 0x00007ff822fad6c1 (most recent call first):
  File "/lib/threading.py", line 10 in wait
"""


@pytest.fixture
def logs(tmp_path):
    def write(*texts):
        paths = [tmp_path / f'worker-{index}.log' for index in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text('12:00:00 I step 3\n' + text)
        return paths

    return write


def test_the_one_in_python_is_blamed_by_those_in_tensorflow(logs):
    place = blame(logs(IN_TENSORFLOW, IN_PYTHON))
    assert (place.worker, place.reads_data) == (1, False)
    assert place.where == '/my/metric.py, line 3, in slow'


def test_a_function_of_the_input_is_blamed(logs):
    place = blame(logs(IN_TENSORFLOW, READING + IN_TENSORFLOW))
    assert (place.worker, place.reads_data) == (1, True)
    assert place.where == '/my/data.py, line 10, in look'


def test_nobody_is_blamed_where_all_wait_or_none_does(logs):
    assert blame(logs(IN_TENSORFLOW, IN_TENSORFLOW)) is None
    assert blame(logs(IN_PYTHON, IN_PYTHON)) is None
    assert blame(logs('', '')) is None


def test_only_the_last_dump_counts(logs):
    assert blame(logs(IN_TENSORFLOW, IN_PYTHON + 'more\n' + IN_TENSORFLOW)) is None


def test_a_dump_of_this_process_is_understood(tmp_path):
    log = tmp_path / 'log'
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with open(log, 'w') as file:
        faulthandler.dump_traceback(file, all_threads=True)
    done.set()
    thread.join()
    frames = [frame for frames in threads(log) for frame in frames]
    assert any(frame[2] == 'test_a_dump_of_this_process_is_understood' for frame in frames)


def test_a_log_that_somebody_has_deleted_holds_no_stacks(tmp_path):
    assert threads(tmp_path / 'worker-0.log') == []
    assert blame([tmp_path / 'worker-0.log', tmp_path / 'worker-1.log']) is None
