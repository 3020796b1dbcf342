"""Real processes for tests: several workers of one job on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.local import free_ports

REPOSITORY = Path(__file__).parents[1]


def environment(**more):
    """This environment without what would make a child another worker or take a GPU."""
    kept = {k: v for k, v in os.environ.items() if k not in ('TF_CONFIG', 'PYTHONPATH')}
    kept.update(CUDA_VISIBLE_DEVICES='-1', TF_CPP_MIN_LOG_LEVEL='2', PYTHONPATH=str(REPOSITORY))
    return {**kept, **more}


def start_workers(command, count, variables=None, **popen):
    """Starts `count` processes of a command, each with its TF_CONFIG if they are several."""
    popen = {'stdout': subprocess.PIPE, **popen}
    cluster = {'worker': [f'127.0.0.1:{port}' for port in free_ports(count)]}
    processes = []
    for index in range(count):
        task = {'cluster': cluster, 'task': {'type': 'worker', 'index': index}}
        config = {'TF_CONFIG': json.dumps(task)} if count > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment(**config, **(variables or {})),
                stderr=subprocess.STDOUT,
                text=True,
                **popen,
            )
        )
    return processes


def finish(processes, timeout=300):
    """Waits for processes; returns [(exit code, output)]; kills what is left on the way out."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_workers(command, count, timeout=300, **variables):
    """Runs a job to its end and returns the workers' outputs; fails with them otherwise."""
    ended = finish(start_workers(command, count, variables), timeout)
    for index, (code, output) in enumerate(ended):
        assert code == 0, f'worker {index} ended with {code}:\n{output[-4000:]}'
    return [output for _, output in ended]
