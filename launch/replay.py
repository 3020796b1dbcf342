"""One step of a job again, in this process: from its directory to `trainer.replay`."""

import bdb
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from absl import logging
from absl.flags import FLAGS

from launch import record
from trainer import gin_files
from trainer.cluster import Cluster
from trainer.console import hidden_stderr, set_up_logging
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

# What is compared with the topology of the job; how its replicas were spread does not matter.
_COMPARED = ('device_type', 'onednn', 'deterministic', 'intra_op_threads')


def replay(dirs: ModelDir, step: int, *, debug: bool = False) -> int:
    """Takes a step of a run again, and prints what it did; nothing in the directory is changed.

    Args:
        dirs: of a run that may still be going on, with a launcher or without.
        step: which one, from 1.
        debug: whether to stop in pdb before the step.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: there is no such run or step, or this host lacks the devices.
    """
    oldest, config = _config(dirs, step)
    topology = _topology(dirs, step)
    # All that TensorFlow reads when it is imported comes before; it is imported here alone, for
    # no other verb should wait for it.
    if threads := topology.get('intra_op_threads'):
        os.environ['TF_NUM_INTRAOP_THREADS'] = str(threads)
    if 'onednn' in topology:
        os.environ['TF_ENABLE_ONEDNN_OPTS'] = str(int(topology['onednn']))
    script = gin_files.read([str(config)])
    FLAGS.mark_as_parsed()  # Or absl says that nobody has parsed them.
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    with hidden_stderr():
        from trainer import gin_setup
        from trainer.strategy import topology as topology_of

    set_up_logging(logging.INFO)

    gin_setup.load(script, unused={'evaluate', 'export'})
    cluster = Cluster()
    replicas = {'devices_per_worker': topology['replicas']} if 'replicas' in topology else {}
    strategy = gin_setup.build_strategy(cluster=cluster, kind='auto', **replicas)
    here = topology_of(strategy, cluster)
    for name in _COMPARED:
        if topology.get(name, here[name]) != here[name]:
            there = f'{name} is {here[name]} here, but was {topology[name]} in the job'
            print(f'phalanx: {there}; the bits may differ', file=sys.stderr)
    try:
        found = gin_setup.replay(
            strategy=strategy, model_dir=str(dirs.path), step=step, oldest=oldest, debug=debug
        )
    except bdb.BdbQuit:
        return 0  # Who leaves the debugger has seen enough.
    print(found)
    return 0


def _config(dirs: ModelDir, step: int) -> tuple[int, Path]:
    """The record in force at a step, and the step from which on it is."""
    records = []
    for path in dirs.config.glob('config-*.gin'):
        if match := re.fullmatch(r'config-(\d+)(?:-(\d+))?\.gin', path.name):
            records.append((int(match[1]), int(match[2] or 1), path))
    if not records:
        raise ConfigError(
            f'{str(dirs.path)!r} holds no recorded configuration (config/config-0.gin). Name the '
            '--model_dir of a run that has begun.'
        )
    before = [each for each in records if each[0] < step]
    if not before:
        first = min(start for start, _, _ in records)
        raise ConfigError(
            f'--step={step} was taken before the first recorded configuration, of step {first}. '
            f'Name a step after {first}.'
        )
    start, _, path = max(before)
    return start, path


def _topology(dirs: ModelDir, step: int) -> dict[str, Any]:
    """What the replicas were when a step was taken; of a run without checkpoints, what is known."""
    found = {}
    for saved, path in dirs.manifests().items():
        with contextlib.suppress(OSError, ValueError, KeyError):
            found[saved] = json.loads(path.read_text())['topology']
    if found:
        # The next checkpoint is the work of the attempt that took the step, the one before
        # perhaps of another.
        after = [each for each in found if each >= step]
        return found[min(after) if after else max(found)]
    with contextlib.suppress(ConfigError):
        job = record.read(dirs)
        known = (
            {'intra_op_threads': int(job['intra_op_threads'])} if job['intra_op_threads'] else {}
        )
        if job['workers'] > 1:
            known['replicas'] = job['workers'] * (job['devices_per_worker'] or 1)
        return known
    return {}
