"""Runs of shipped configurations, as a user types them, and what they came to."""

import os
import re

import pytest

from tests.processes import REPOSITORY, finish, start_workers

MNIST_DIR = os.environ.get('PHALANX_MNIST_DIR')
needs_mnist = pytest.mark.skipif(
    not MNIST_DIR, reason='PHALANX_MNIST_DIR, a directory with the files of MNIST, is not set'
)
_HOURS = 3600


def run(*command, cwd=None, timeout=2 * _HOURS):
    """Runs Python with a command line; returns what it says, and fails with it otherwise."""
    ((code, output),) = finish(start_workers(command, 1, cwd=cwd), timeout)
    print(output[-2000:])  # Which pytest shows of a test that fails, and with -s.
    assert code == 0, f'{command} ended with {code}'
    return output


def shown(page, first):
    """Returns the code or configuration of a page of docs/ that begins with `first`."""
    blocks = re.findall(r'^```\w*\n(.*?)^```', (REPOSITORY / page).read_text(), re.DOTALL | re.M)
    (found,) = [block for block in blocks if block.startswith(first)]
    return found


def final_metrics(config, model_dir, *flags, cwd=None, timeout=2 * _HOURS):
    """Runs a configuration to its end in a process of its own.

    Args:
        config: as for `--gin_file`, such as 'runs/digits.gin'.
        model_dir: where it is written; one that was begun is finished.
        *flags: further ones, such as '--gin.SEED=1'.
        cwd: the working directory.
        timeout: seconds after which the run is ended and the test fails.

    Returns:
        What the run says last: {'eval/accuracy': 0.98, 'train/loss': ..., ...}.
    """
    command = ['-m', 'trainer', f'--gin_file={config}', f'--model_dir={model_dir}', *flags]
    output = run(*command, cwd=cwd, timeout=timeout)
    last = re.findall(r'^finished step \d+: (.*)$', output, re.MULTILINE)[-1]
    return {name: float(value) for name, value in re.findall(r'([\w/]+) (\S+?)(?:,|$)', last)}
