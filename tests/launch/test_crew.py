import queue
import sys

from launch.crew import _Member


def test_what_is_printed_while_python_starts_is_no_message():
    said = queue.Queue()
    code = (
        'import os; os.write(1, b"hello \\xff\\n{\\n3\\n"); print(\'{"plan": {}}\'); print("bye")'
    )
    member = _Member([sys.executable, '-c', code], said)
    try:
        assert said.get(timeout=60) == (member, {'plan': {}})
        assert said.get(timeout=60) == (member, None)
    finally:
        member.end()
