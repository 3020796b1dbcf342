"""Leader and agents of a job, really connected over loopback; their workers are real processes, of
a program that does not take TensorFlow's time to start."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import agent as agent_module
from launch import child, exits
from launch import roster as roster_module
from launch import wire as wire_module
from launch.agent import Agent, Unmet
from launch.gang import Gang, Missing
from launch.place import Place, ports
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir
from trainer.observe import phases

# A worker: says what it was given, and what its name tells it to do.
WORKER = f"""
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
task = json.loads(os.environ['TF_CONFIG'])['task']['index']
print(os.environ['TF_CONFIG'], flush=True)
with open(os.environ['{phases.VARIABLE}'], 'a') as file:
    file.write(json.dumps(dict(time=time.time(), phase='stepping', step=task)) + '\\n')
path = pathlib.Path('end')
while not path.exists():
    time.sleep(0.05)
sys.exit(json.loads(path.read_text())[task])
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Has agents start that program in place of a trainer; returns the file that ends it."""
    (tmp_path / 'quick').mkdir()
    (tmp_path / 'quick' / 'trainer_stand_in.py').write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path / "quick"}:{Path(__file__).parents[2]}')
    monkeypatch.setattr(
        agent_module.local.child,
        'command',
        lambda module, *flags: COMMAND('trainer_stand_in', *flags),
    )
    return tmp_path / 'end'


COMMAND = child.command


class Job:
    """A leader, and agents in threads of this process."""

    def __init__(self, path, hosts, *, seconds=20.0, each=1, stays=False, digest='d'):
        self.places = [
            Place(rank, hosts, '127.0.0.1', ports(str(path)), stays=stays) for rank in range(hosts)
        ]
        self.path, self.digest, self.each, self.seconds = path, digest, each, seconds
        self.said, self.codes, self.threads = [], {}, {}
        self.gang = Gang(
            self.places[0], digest, workers_per_host=each, seconds=seconds, tell=self.said.append
        )

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(self.gang)
        return self

    def __exit__(self, *exc):
        self.gang.end(1)
        self.stack.close()
        for thread in self.threads.values():
            thread.join(10)

    def join(self, rank, *, digest=None, place=None):
        agent = Agent(
            place or self.places[rank],
            digest or self.digest,
            flags=[],
            dirs=ModelDir(self.path),
            workers_per_host=self.each,
            seconds=self.seconds,
        )

        def run():
            try:
                self.codes[rank] = agent.run(handles_signals=False)
            except (ConfigError, Unmet) as error:
                self.codes[rank] = error

        self.threads[rank] = threading.Thread(target=run, daemon=True)
        self.threads[rank].start()
        return agent

    def gather(self, workers=None, least=None):
        workers = workers or len(self.places) * self.each
        return self.gang.gather(workers, least or workers, stop=lambda: False, show=lambda: None)

    def start(self, count=None, attempt=1):
        count = count or len(self.places) * self.each
        directory = ModelDir(self.path).attempt(attempt)
        directory.mkdir(parents=True, exist_ok=True)
        return self.gang.start([], count, directory, wanted=count, variables={})


def until(done, seconds=20):
    end = time.monotonic() + seconds
    while not (result := done()):
        assert time.monotonic() < end, 'it has not come to that'
        time.sleep(0.02)
    return result


def test_all_workers_have_one_cluster_of_ports_that_agents_have_chosen(tmp_path, program):
    with Job(tmp_path / 'run', 3, each=2) as job:
        for rank in range(3):
            job.join(rank)
        assert job.gather() == 6
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        told = [json.loads(path.read_text()) for path in workers.logs]
        assert [each['task']['index'] for each in told] == list(range(6))
        assert len({json.dumps(each['cluster']) for each in told}) == 1
        assert len(set(told[0]['cluster']['worker'])) == 6
        until(lambda: all(path.exists() for path in workers.phases))
        steps = [json.loads(path.read_text())['step'] for path in workers.phases]
        assert steps == list(range(6))
        assert workers.states() == ['running'] * 6
        program.write_text('[0, 0, 0, 5, 0, 0]')
        until(lambda: None not in workers.codes())
        assert workers.codes() == [0, 0, 0, 5, 0, 0]
        workers.kill()
        job.gang.end(0)
        until(lambda: len(job.codes) == 3)
        assert job.codes == {0: 0, 1: 0, 2: 0}
    first = exits.read(ModelDir(tmp_path / 'run'), 1)
    assert {each.rank: dict(each.codes) for each in first} == {
        0: {0: 0, 1: 0},
        1: {2: 0, 3: 5},
        2: {4: 0, 5: 0},
    }


def test_a_host_that_does_not_come_is_named(tmp_path):
    with Job(tmp_path / 'run', 3, seconds=1.0) as job:
        job.join(0)
        job.join(2)
        with pytest.raises(Missing, match=r'after 1 s these have not come: host 1\.'):
            job.gather()


def test_a_leader_that_does_not_come_is_named(tmp_path):
    job = Job(tmp_path / 'run', 2, seconds=1.0)
    job.join(1)
    error = until(lambda: job.codes.get(1))
    assert isinstance(error, Unmet)
    assert 'host 0, the leader, has not answered within 1 s' in str(error)


def test_another_configuration_is_told_on_both_sides(tmp_path):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        job.join(1, digest='other')
        with pytest.raises(ConfigError, match=r'host 1 .*has another configuration'):
            job.gather()
        error = until(lambda: job.codes.get(1))
        assert isinstance(error, ConfigError)


def test_a_task_that_is_killed_is_a_lost_host_until_it_comes_again(tmp_path, program):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        lost = job.join(1)
        job.gather()
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        assert workers.lost() is None
        pid = lost._share.workers._processes[0].pid
        lost._wire._writer.transport.abort()  # As the kernel does when a process dies.
        worker, reason = until(workers.lost)
        assert worker == 1
        assert reason.startswith('host 1')
        until(lambda: not os.path.exists(f'/proc/{pid}'))
        workers.kill()
        assert workers.codes()[0] == -signal.SIGKILL
        assert job.gather() == 2  # It has called again by itself.


def test_an_elastic_job_goes_on_with_those_that_have_come(tmp_path):
    with Job(tmp_path / 'run', 3, seconds=1.0) as job:
        job.join(0)
        job.join(2)
        assert job.gather(3, least=2) == 2


def test_a_host_that_goes_alone_saves_and_the_others_stay(tmp_path, program):
    with Job(tmp_path / 'run', 2, stays=True) as job:
        job.join(0)
        going = job.join(1)
        job.gather()
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        going._ask(signal.SIGTERM)
        until(workers.leaving)
        workers.signal(signal.SIGTERM)
        until(lambda: workers.codes() == [75, 75])
        assert until(lambda: job.codes.get(1)) == 75
        workers.kill()
        job.join(1)
        assert job.gather() == 2


def test_a_worker_that_is_stopped_is_seen_by_the_leader(tmp_path, program):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        other = job.join(1)
        job.gather()
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        other._share.workers.signal(signal.SIGSTOP)
        until(lambda: workers.states() == ['running', 'stopped'])


def test_what_is_no_task_is_sent_away_and_disturbs_nobody(tmp_path):
    import socket

    with Job(tmp_path / 'run', 2) as job:
        for words in (b'GET / HTTP/1.1\r\n\r\n', b'{"rank": 99}\n', b'[]\n', b'\xff\xfe\n'):
            with socket.create_connection(('127.0.0.1', job.gang.port)) as stranger:
                stranger.sendall(words)
                stranger.settimeout(5)
                assert stranger.recv(100) == b''
        for rank in range(2):
            job.join(rank)
        assert job.gather() == 2


def test_a_host_that_is_lost_before_the_start_is_missed_and_not_left_out(tmp_path, program):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        lost = job.join(1)
        assert job.gather() == 2
        lost.leave()
        until(lambda: lost._wire)
        lost._wire._writer.transport.abort()
        until(lambda: len(job.gang.roster.present()) == 1)
        workers = job.start()
        assert len(workers.codes()) == 2
        worker, reason = until(workers.lost)
        assert worker == 1
        assert reason.endswith('is lost: it has gone')
        told = until(lambda: workers.logs[0].exists() and workers.logs[0].read_text())
        assert len(json.loads(told)['cluster']['worker']) == 2
        workers.kill()


def test_of_two_tasks_of_one_rank_the_first_stays_and_the_second_takes_its_place_when_it_goes(
    tmp_path, program, capfd, monkeypatch
):
    monkeypatch.setattr(agent_module, '_TELL_SECONDS', 0.0)
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        first = job.join(1)
        job.gather()
        workers = job.start()
        job.join(1)
        until(lambda: 'host 1 has another task in this job already' in capfd.readouterr().err)
        time.sleep(1.0)
        assert workers.lost() is None
        first.leave()
        first._wire._writer.transport.abort()
        until(workers.lost)
        workers.kill()
        assert job.gather() == 2
        assert job.gang.roster.members[1].task != first._task


def test_a_signal_that_comes_while_the_agent_calls_reaches_the_leader(tmp_path, monkeypatch):
    heard = []
    with Job(tmp_path / 'run', 2) as job:
        job.gang.when_asked(lambda number, times: heard.append((number, times)))
        greet = Agent._greet

        async def interrupted(self, port):
            wire = await greet(self, port)
            self._ask(signal.SIGTERM)
            return wire

        monkeypatch.setattr(Agent, '_greet', interrupted)
        job.join(1)
        until(lambda: heard == [(signal.SIGTERM, 1)])


def test_signals_at_once_are_one_and_a_second_one_ends_all_at_once(tmp_path, program):
    heard = []
    with Job(tmp_path / 'run', 2) as job:
        job.gang.when_asked(lambda number, times: heard.append((number, times)))
        job.join(0)
        other = job.join(1)
        job.gather()
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))

        def ask(number):
            other._loop.call_soon_threadsafe(other._ask, number)

        ask(signal.SIGHUP)
        ask(signal.SIGTERM)
        until(lambda: heard == [(signal.SIGHUP, 1)])
        assert workers.codes() == [None, None]
        time.sleep(0.6)
        ask(signal.SIGTERM)
        until(lambda: workers.codes()[1] == -signal.SIGKILL, seconds=5)
        assert heard == [(signal.SIGHUP, 1), (signal.SIGTERM, 2)]


def test_a_host_that_cannot_start_its_workers_says_why_and_stays(tmp_path, program, monkeypatch):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        job.join(1)
        job.gather()
        start = agent_module.local.Workers

        def full(*args, first, **keywords):
            if first == 1:
                raise OSError(28, 'No space left on device')
            return start(*args, first=first, **keywords)

        monkeypatch.setattr(agent_module.local, 'Workers', full)
        workers = job.start()
        until(lambda: workers.codes()[1] == 1)
        assert workers.lost() is None
        assert 'cannot start its workers: [Errno 28] No space left on device' in job.said[0]
        workers.kill()
        monkeypatch.setattr(agent_module.local, 'Workers', start)
        assert job.gather() == 2
        workers = job.start(attempt=2)
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        workers.kill()


def test_a_full_disk_under_the_output_costs_no_host(tmp_path, program, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, 'No space left on device')

        def flush(self):
            pass

    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        other = job.join(1)
        other._tee = True
        job.gather()
        monkeypatch.setattr(sys, 'stdout', Full())
        workers = job.start()
        until(lambda: all(path.exists() and path.read_text() for path in workers.logs))
        time.sleep(0.5)
        program.write_text('[0, 0]')
        until(lambda: workers.codes() == [0, 0], seconds=5)


@pytest.mark.skipif(not Path('/proc/net/if_inet6').exists(), reason='no IPv6 here')
def test_hosts_that_call_over_ipv6_have_addresses_in_brackets(tmp_path, program):
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        job.join(1, place=Place(1, 2, '::1', job.places[0].ports))
        job.gather()
        workers = job.start()
        told = until(lambda: workers.logs[1].exists() and workers.logs[1].read_text())
        addresses = json.loads(told)['cluster']['worker']
        assert all(each.startswith('[::1]:') for each in addresses)
        workers.kill()


def test_a_file_server_that_stalls_loses_no_host(tmp_path, program, monkeypatch):
    monkeypatch.setattr(wire_module.Wire.hear, '__defaults__', (2.0,))
    monkeypatch.setattr(agent_module, 'BEAT_SECONDS', 0.5)
    monkeypatch.setattr(roster_module, 'BEAT_SECONDS', 0.5)
    with Job(tmp_path / 'run', 2) as job:
        job.join(0)
        job.join(1)
        job.gather()
        directory = ModelDir(tmp_path / 'run').attempt(1)
        directory.mkdir(parents=True)
        stalled = directory / 'worker-1.phases.jsonl'
        os.mkfifo(stalled)  # Who opens it for writing waits.
        workers = job.start()
        until(lambda: workers.phases[0].exists())
        time.sleep(4.0)
        lost = workers.lost()
        with open(stalled) as file:
            assert json.loads(file.readline())['step'] == 1
        assert lost is None
        program.write_text('[0, 0]')
        until(lambda: workers.codes() == [0, 0])


def test_of_many_missing_hosts_some_are_named(tmp_path):
    named = pytest.raises(Missing, match=r'host 0, host 1, .*, host 19 and 980 more\. See')
    with Job(tmp_path / 'run', 1000, seconds=1.0) as job, named:
        job.gather()


def test_256_tasks_meet_and_a_missing_one_is_named(tmp_path):
    with Job(tmp_path / 'run', 256, seconds=60.0) as job:
        begin = time.monotonic()
        for rank in range(255):
            job.join(rank)
        until(lambda: len(job.gang.roster.present()) == 255, seconds=60)
        job.gang._seconds = time.monotonic() - begin
        with pytest.raises(Missing, match=r'these have not come: host 255\.'):
            job.gather()
        job.gang._seconds = 60.0
        job.join(255)
        assert job.gather() == 256


def test_a_leader_that_goes_alone_leaves_the_others_waiting_for_the_next(tmp_path):
    with Job(tmp_path / 'run', 2, stays=True) as job:
        job.join(0)
        agent = job.join(1)
        job.gather()
        job.gang.end(75)
        assert until(lambda: job.codes.get(0)) == 75
        job.stack.close()
        until(lambda: agent._wire._writer.is_closing())
        assert 1 not in job.codes
        agent.leave()
