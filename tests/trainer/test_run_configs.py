"""Every run that is shipped trains on two replicas and is exported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, environment
from tests.trainer import run_configs, source_runs

PROGRAM = REPOSITORY / 'tests' / 'trainer' / 'run_configs.py'
SERVED = """
import sys
sys.modules.update(dict.fromkeys(('keras', 'trainer', 'gin')))  # As if they were not installed.
import tensorflow as tf
for directory in sys.argv[1:]:
    serve = tf.saved_model.load(directory).signatures['serving_default']
    specs = serve.structured_input_signature[1].items()
    empty = {name: tf.zeros([2, *(d or 1 for d in s.shape[1:])], s.dtype) for name, s in specs}
    outputs = serve(**empty)
    print(len(outputs), all(o.shape[0] == 2 for o in outputs.values()))
"""


def test_every_run_is_trained_by_this_test_or_by_that_of_sources(tmp_path):
    sources = {file for files, _ in source_runs.cases(tmp_path).values() for file in files}
    shipped = {path.stem for path in (REPOSITORY / 'configs' / 'runs').glob('*.gin')}
    by_sources = {Path(file).stem for file in sources if str(file).startswith('runs/')}
    assert run_configs.cases(tmp_path).keys() | by_sources == shipped


@pytest.mark.slow
def test_every_run_trains_on_two_replicas_and_exports_are_served(tmp_path):
    run_configs.write_data(tmp_path)
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    options = {'env': environment(), 'capture_output': True, 'text': True, 'check': False}
    done = subprocess.run(command, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines() if line.count(' ') == 3]
    assert [name for name, *_ in found] == list(run_configs.cases(tmp_path))
    assert {(replicas, steps) for _, replicas, steps, _ in found} == {('2', '3')}
    # A process that knows nothing but TensorFlow.
    served = subprocess.run(
        [sys.executable, '-c', SERVED, *(path for *_, path in found if path != '-')],
        timeout=200,
        **options,
    )
    assert served.returncode == 0, served.stderr[-3000:]
    assert served.stdout.split() == ['1', 'True'] * len(run_configs.EXPORTED)
