"""Every family of models: the same on any topology, and after any number of deaths.

Writes the table of docs/parity.md anew where PHALANX_WRITE_DOCS is set.
"""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.processes import REPOSITORY, environment, run_workers
from tests.trainer.family_runs import WHY_NOT, runs, techniques

PROGRAM = REPOSITORY / 'tests' / 'trainer' / 'family_runs.py'
TABLE = REPOSITORY / 'docs' / 'parity.md'
ONE = 'one device'
SAME = {'2 replicas': (1, 2), '2 workers': (2, 1)}
ELASTIC = {'1 replica': (1, 1), '2 replicas': (1, 2), '4 replicas': (1, 4), '2 x 2': (2, 2)}
TOLERANCE = 1e-5
# After a kink: where an input of a rectifier is as near to 0 as rounding, it is on this side with
# one topology and on that with another, and its derivative jumps. Which run comes upon one is a
# matter of the processor. Before it runs agree as ever; what is computed wrongly never does.
BEFORE_KINK, AFTER_KINK = 1e-6, 1e-3


def train(out, workers, devices, *kinds, timeout=500):
    """Returns what each worker got, {(kind, name of the run): ...}."""
    command = [PROGRAM, out, devices, *kinds]
    # The bits of a kernel may depend on how many threads share its work.
    threads = {'TF_NUM_INTRAOP_THREADS': '1'}
    if workers > 1:
        run_workers(command, workers, timeout=timeout, **threads)
    else:
        command = [sys.executable, *map(str, command)]
        subprocess.run(command, env=environment(**threads), check=True, timeout=timeout)
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
    # Python's max would pass over what is not a number.
    gaps = [(np.abs(a - b) / np.maximum(1.0, np.abs(b))).max(initial=0) for a, b in pairs]
    return float(np.max(gaps))


def gap(one, other):
    """Returns how far two runs of a family are apart; fails if that is no kink's doing."""
    found = difference(
        {**one['variables'], 'loss': one['loss']}, {**other['variables'], 'loss': other['loss']}
    )
    if not found <= TOLERANCE:
        assert difference(one['early'], other['early']) <= BEFORE_KINK
        assert found <= AFTER_KINK
    return found


def gaps(results):
    """Returns {(kind, name of the run): [the largest difference, by topology]}; fails if far."""
    found, far = {}, {}
    for key, wanted in results[ONE][0].items():
        try:
            found[key] = [
                max(gap(worker[key], wanted) for worker in results[topology]) for topology in SAME
            ]
        except AssertionError as error:
            far[key] = str(error)
    assert not far
    # A kink is rare.
    kinks = [key for key, row in found.items() if max(row) > TOLERANCE]
    assert len(kinks) <= 1 + len(found) / 5, kinks
    return found


@pytest.mark.slow
def test_twenty_steps_of_every_family_are_the_same_on_any_topology(results):
    lines = [
        f'| `{family}` | {WHAT[kind]} | {" | ".join(f"{gap:.0e}" for gap in row)} |'
        for (kind, family), row in gaps(results).items()
    ]
    header = '| Family | Trained with | 2 replicas | 2 workers |', '|---|---|---|---|'
    written = check_table('families', [*header, *lines])
    assert [line.split('|')[1:3] for line in written[2:]] == [
        line.split('|')[1:3] for line in lines
    ]


@pytest.mark.results
def test_every_technique_is_the_same_with_every_family_on_any_topology(tmp_path_factory):
    results = {
        name: train(tmp_path_factory.mktemp('crossed'), *topology, 'crossed', timeout=3600)
        for name, topology in {ONE: (1, 1), **SAME}.items()
    }
    (mirrored,), workers = results['2 replicas'], results['2 workers']
    for worker in workers:
        assert hashes(worker) == hashes(mirrored)
    rows = {name: dict.fromkeys(techniques(), '') for name in runs('plain')}
    for (_, name), row in gaps(results).items():
        family, technique = name.split()
        rows[family][technique] = f'{max(row):.0e}'
    for technique, families in WHY_NOT.items():
        for family, reason in families.items():
            rows[family][technique] = reason
    header = ['', *techniques()]
    lines = [f'| {" | ".join(header)} |', '|---' * len(header) + '|']
    lines += [f'| `{name}` | {" | ".join(row.values())} |' for name, row in rows.items()]
    written = check_table('crossed', lines)
    assert [re.sub(r'\d+e-\d+', '#', each) for each in written] == [
        re.sub(r'\d+e-\d+', '#', each) for each in lines
    ]


WHAT = {
    'plain': 'SGD with momentum',
    'techniques': 'AdamW, cosine schedule, warm-up, clipping, decay exclusions, averages, '
    'accumulation',
}


def check_table(name, lines):
    """Returns the lines that the documentation has, or writes these; figures differ by machine."""
    text = TABLE.read_text()
    head, begin, rest = text.partition(f'<!-- {name} -->\n')
    table, end, tail = rest.partition('<!-- end -->\n')
    if os.environ.get('PHALANX_WRITE_DOCS'):
        TABLE.write_text(head + begin + '\n'.join(lines) + '\n' + end + tail)
        return lines
    return table.splitlines()


def hashes(worker):
    return {key: run['sha256'] for key, run in worker.items()}


@pytest.mark.slow
def test_two_replicas_in_one_process_and_in_two_give_the_same_bits_of_every_family(results):
    (mirrored,), workers = results['2 replicas'], results['2 workers']
    for worker in workers:
        assert hashes(worker) == hashes(mirrored)


@pytest.mark.slow
def test_three_families_end_with_the_same_bits_on_any_number_of_replicas(tmp_path):
    found = {}
    for name, topology in ELASTIC.items():
        (tmp_path / name).mkdir()
        for worker in train(tmp_path / name, *topology, 'elastic'):
            for (_, family), run in worker.items():
                found.setdefault(family, set()).add(run['sha256'])
    assert found.keys() == runs('elastic').keys()
    assert {family: len(each) for family, each in found.items()} == dict.fromkeys(found, 1)


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
