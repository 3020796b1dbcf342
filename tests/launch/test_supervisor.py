"""What the launcher does before an attempt; chaos/test_supervisor.py is about whole jobs."""

import json
import os
import signal
import threading

import pytest

from launch.gang import Missing
from launch.local import Host
from launch.supervisor import Supervisor
from trainer.errors import Preempted
from trainer.model_dir import ModelDir


class Script:
    def save(self, path):
        path.write_text('{}')


class Hosts(Host):
    """Several hosts, none of which comes."""

    lock_seconds = 30.0

    def __init__(self):
        self.least = []

    def gather(self, workers, least, *, stop, show):
        self.least.append(least)
        raise Missing('nobody has come')


def test_who_waits_for_another_launcher_says_so_and_can_be_stopped(tmp_path, capfd):
    dirs, hosts = ModelDir(tmp_path), Hosts()
    dirs.create()
    job = Supervisor([], Script(), workers=1, dirs=dirs, hosts=hosts)
    with dirs.lock('logs/lock'):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Preempted, match=f'while process {os.getpid()} on'):
            job.run()
    said = capfd.readouterr()
    assert f'waiting for process {os.getpid()}' in said.out + said.err
    assert 'for 30 s at most' in said.out + said.err
    assert not hosts.least


@pytest.mark.parametrize(('batch', 'least'), [(64, 4), (60, 3), (66, 3), (18, 3), (6, 3)])
def test_no_fewer_workers_are_waited_for_than_can_share_the_batch(tmp_path, batch, least):
    dirs, hosts = ModelDir(tmp_path), Hosts()
    dirs.create()
    manifest = dirs.checkpoints / 'step-00000001' / 'manifest.json'
    manifest.parent.mkdir()
    topology = {'replicas_per_worker': 1}
    manifest.write_text(json.dumps({'topology': topology, 'global_batch_size': batch}))
    job = Supervisor([], Script(), workers=6, least=3, dirs=dirs, hosts=hosts)
    assert job.run() == 75
    assert hosts.least == [least]
