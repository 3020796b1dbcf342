"""The results that docs/models/text.md states."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from tests.processes import REPOSITORY
from tests.results.running import final_metrics

LIBRARY = Path(os.__file__).parent
PAGE = REPOSITORY / 'docs/models/text.md'


def processor_seconds():
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_standard_library_is_told_in_less_than_2_2_bits_a_byte_within_20_cpu_minutes(tmp_path):
    before = processor_seconds()
    found = final_metrics(
        'runs/text.gin',
        tmp_path,
        f"--gin.TRAIN_FILES=['{LIBRARY}/[!t]*.py', '{LIBRARY}/[a-r]*/**/*.py']",
        f"--gin.EVAL_FILES='{LIBRARY}/t*.py'",
    )
    took = processor_seconds() - before
    print(f'{found["eval/bits_per_byte"]} bits per byte in {took / 60:.1f} minutes of CPU time')
    assert found['eval/bits_per_byte'] < 2.2
    assert took < 20 * 60


def test_libraries_are_told_apart_by_pieces_of_their_source(tmp_path):
    script = next(
        code
        for code in re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
        if 'places' in code
    )
    subprocess.run([sys.executable, '-c', script, tmp_path / 'pieces'], check=True)
    sizes = [len(list(each.iterdir())) for each in (tmp_path / 'pieces/test').iterdir()]
    found = final_metrics(
        'runs/text_folder.gin',
        tmp_path / 'run',
        f"--gin.DATA_DIR='{tmp_path / 'pieces'}'",
        '--gin.NUM_CLASSES=4',
    )
    majority = max(sizes) / sum(sizes)
    print(f'{found["eval/accuracy"]:.1%} right, {majority:.1%} by the most frequent class')
    assert majority < 0.35
    assert found['eval/accuracy'] > 0.7
