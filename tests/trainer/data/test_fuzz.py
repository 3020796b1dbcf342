import json
import os
import random
import subprocess
import sys

import pytest

from tests.processes import environment
from tests.trainer.data import fuzz

COUNT = 1000 if os.environ.get('PHALANX_CHAOS') == 'long' else 300


@pytest.mark.slow
def test_mutated_files_are_refused_or_named_or_read_and_nothing_else(tmp_path):
    seed = random.randrange(2**31)
    print('seed', seed)
    done = subprocess.run(
        [sys.executable, fuzz.__file__, str(tmp_path), str(COUNT), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(done.stdout)
    print(outcomes)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == COUNT
    # What was changed is noticed wherever a format can tell.
    for kind in ('tfrecord', 'array_record', 'parquet', 'png'):
        bad = outcomes[kind].get('refused', 0) + outcomes[kind].get('damaged', 0)
        assert bad > outcomes[kind].get('read', 0)
