"""Every family of models: the same on any topology, and after any number of deaths.

Writes the table of docs/parity.md anew where PHALANX_WRITE_DOCS is set.
"""

import json
import os
import pickle
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.processes import REPOSITORY, environment, run_workers
from tests.trainer.family_runs import runs

PROGRAM = REPOSITORY / 'tests' / 'trainer' / 'family_runs.py'
TABLE = REPOSITORY / 'docs' / 'parity.md'
ONE = 'one device'
SAME = {'2 replicas': (1, 2), '2 workers': (2, 1)}
ELASTIC = {'1 replica': (1, 1), '2 replicas': (1, 2), '4 replicas': (1, 4), '2 x 2': (2, 2)}
TOLERANCE = 1e-5
# Its batch normalisation divides by what hardly differs from 0, of units that seldom fire.
LOOSER = {'cnn': 5e-5}


def train(out, workers, devices, *kinds):
    """Returns what each worker got, {(kind, family): ...}."""
    command = [PROGRAM, out, devices, *kinds]
    # The bits of a kernel may depend on how many threads share its work.
    threads = {'TF_NUM_INTRAOP_THREADS': '1'}
    if workers > 1:
        run_workers(command, workers, timeout=500, **threads)
    else:
        command = [sys.executable, *map(str, command)]
        subprocess.run(command, env=environment(**threads), check=True, timeout=500)
    return [pickle.loads((out / f'{index}.pickle').read_bytes()) for index in range(workers)]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Topology -> what each worker got; every family on every topology, in few processes."""
    topologies = {ONE: (1, 1), **SAME}
    return {
        name: train(tmp_path_factory.mktemp('families'), *topology, 'plain', 'techniques')
        for name, topology in topologies.items()
    }


def difference(one, other):
    """The largest difference of a number, relative to what is 1 or larger."""
    assert one.keys() == other.keys()
    pairs = [
        (np.asarray(value, float), np.asarray(other[path], float)) for path, value in one.items()
    ]
    return max(float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max(initial=0)) for a, b in pairs)


@pytest.mark.slow
def test_twenty_steps_of_every_family_are_the_same_on_any_topology(results):
    expected, far = results[ONE][0], []
    lines = []
    for kind, family in expected:
        row = []
        for topology in SAME:
            for worker in results[topology]:
                found, wanted = worker[kind, family], expected[kind, family]
                gap = difference(found['variables'], wanted['variables'])
                gap = max(gap, abs(found['loss'] - wanted['loss']))
                if not gap <= LOOSER.get(family, TOLERANCE):
                    far.append((kind, family, topology, gap))
            row.append(f'{gap:.0e}')
        lines.append(f'| `{family}` | {WHAT[kind]} | {" | ".join(row)} |')
    assert not far
    check_table(lines)


WHAT = {
    'plain': 'SGD with momentum',
    'techniques': 'AdamW, cosine schedule, warm-up, clipping, decay exclusions, averages, '
    'accumulation',
}


def check_table(lines):
    """Sees that the documentation has these rows, or writes them; figures differ by machine."""
    text = TABLE.read_text()
    head, begin, rest = text.partition('<!-- families -->\n')
    table, end, tail = rest.partition('<!-- end -->\n')
    if os.environ.get('PHALANX_WRITE_DOCS'):
        header = ['| Family | Trained with | 2 replicas | 2 workers |', '|---|---|---|---|']
        TABLE.write_text(head + begin + '\n'.join([*header, *lines]) + '\n' + end + tail)
        return
    written = [line.split('|')[1:3] for line in table.splitlines()[2:]]
    assert written == [line.split('|')[1:3] for line in lines]


@pytest.mark.slow
def test_two_replicas_in_one_process_and_in_two_give_the_same_bits_of_every_family(results):
    (mirrored,), workers = results['2 replicas'], results['2 workers']
    for worker in workers:
        assert {key: run['sha256'] for key, run in worker.items()} == {
            key: run['sha256'] for key, run in mirrored.items()
        }


@pytest.mark.slow
def test_three_families_end_with_the_same_bits_on_any_number_of_replicas(tmp_path):
    hashes = {}
    for name, topology in ELASTIC.items():
        (tmp_path / name).mkdir()
        for worker in train(tmp_path / name, *topology, 'elastic'):
            for (_, family), run in worker.items():
                hashes.setdefault(family, set()).add(run['sha256'])
    assert hashes.keys() == runs('elastic').keys()
    assert {family: len(found) for family, found in hashes.items()} == dict.fromkeys(hashes, 1)


@pytest.mark.chaos
def test_every_family_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    (whole,) = train(tmp_path, 1, 2, 'plain')
    expected = {' '.join(key): run['sha256'] for key, run in whole.items()}
    out = tmp_path / 'killed'
    out.mkdir()
    command = [sys.executable, str(PROGRAM), str(out), '2', 'plain']
    threads = environment(TF_NUM_INTRAOP_THREADS='1')
    checkpoints, killed = 0, 0
    while killed < 6:
        with open(tmp_path / f'{killed}.log', 'w') as log:
            process = subprocess.Popen(command, env=threads, stdout=log, stderr=log)
        # Somewhere after the next checkpoint or the one after it, whichever family that is of.
        checkpoints += random.randint(1, 4)
        end = time.monotonic() + 300
        while len(list(out.glob('plain/*/checkpoints/step-*'))) < checkpoints:
            said = (tmp_path / f'{killed}.log').read_text()[-3000:]
            assert process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.wait()
        killed += 1
    subprocess.run(command, env=threads, check=True, timeout=500)
    assert json.loads((out / '0.json').read_text()) == expected
