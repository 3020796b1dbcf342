"""Real training on the stand-in for Kubernetes."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from launch.job import Policy, Resources
from tests.cluster.hosts import needs_root
from tests.cluster.kubernetes_jobs import Cluster
from tests.processes import environment
from trainer import gin_files

pytest.importorskip('kubernetes', reason="pip install 'phalanx[kubernetes]'")

pytestmark = [pytest.mark.cluster, needs_root]

FLAGS = [
    'STEPS = 400',
    'DEVICES = 1',
    'train.log_every = 50',
    'train.save_every = 50',
    'train.eval_every = 400',
    'train.sample_log = True',
]


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path, prefix='pxkt', net='10.82.2') as found:
        yield found


def _bits(model_dir):
    manifest = model_dir / 'checkpoints' / 'step-00000400' / 'manifest.json'
    return json.loads(manifest.read_text())['state_sha256'], (model_dir / 'samples.tsv').read_text()


def test_a_real_run_whose_pods_are_lost_ends_with_the_bits_of_an_undisturbed_one(cluster):
    undisturbed = cluster.directory / 'undisturbed'
    command = [sys.executable, '-m', 'launch', 'run', '--workers=2', f'--model_dir={undisturbed}']
    command += ['--gin_file=runs/digits.gin', *(f'--gin_bindings={each}' for each in FLAGS)]
    threads = environment(TF_NUM_INTRAOP_THREADS='1')
    subprocess.run(command, check=True, env=threads, capture_output=True, timeout=500)

    script = gin_files.read(['runs/digits.gin'], [*FLAGS, "MODEL_DIR = '/models/digits'"])
    job = dataclasses.replace(
        cluster.job,
        config=json.dumps(script.parts),
        workers=2,
        min_workers=2,
        python=sys.executable,
        policy=Policy(meeting_seconds=120),
        resources=Resources(cpus=1),
    )
    submitted = cluster.submit(job)
    model_dir = cluster.claim / 'digits'
    steps = model_dir / 'checkpoints'
    cluster.until(lambda: list(steps.glob('step-00000[1-4]*')), 400)
    stays = cluster.running(0)
    cluster.stand_in.pods.signal(cluster.running(1), signal.SIGKILL)
    cluster.until(lambda: list(steps.glob('step-00000[2-4]*')), 400)
    assert cluster.running(0) is stays
    cluster.stand_in.pods.disrupt(stays, 'EvictionByEvictionAPI', 'drained')
    found = cluster.wait(submitted, 'finished', 500)
    assert stays['status']['containerStatuses'][0]['state']['terminated']['exitCode'] == 75
    assert found.restarts >= 1
    assert _bits(model_dir) == _bits(undisturbed)
