"""How a job stands, and what its workers say: for jobs that run and for those that have ended."""

import socket
import sys
import time
from pathlib import Path

import psutil

from launch.ledger import Ledger, json_lines
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

_FOLLOW_SECONDS = 0.5


def status(dirs: ModelDir) -> str:
    """Returns a few lines on the job in a directory.

    Raises:
        ConfigError: no job has run there.
    """
    events = Ledger(dirs.path / 'ledger.jsonl').history()
    jobs = [each for each in events if each['event'] == 'job']
    if not jobs:
        raise ConfigError(f'The ledger of {str(dirs.path)!r} lacks its beginning.')
    job = jobs[-1]
    last = events[-1]
    if last['event'] == 'end':
        meaning = {0: 'finished', 75: 'stopped; run it again to go on', 2: 'refused'}
        lines = [f'{meaning.get(last["code"], "failed")} (exit code {last["code"]})']
    elif _runs(job):
        lines = [f'running, process {job["pid"]} on {job["host"]}']
    else:
        lines = ['its launcher was killed; run it again to go on']
    attempts = [each for each in events if each['event'] == 'attempt']
    if attempts:
        number = attempts[-1]['number']
        lines.append(f'attempt {number}, begun at step {attempts[-1]["step"]}')
        ended = [e for e in events if e['event'] == 'attempt_end' and e['number'] == number]
        for index in range(attempts[-1]['workers']):
            word = _last_word(_file(dirs, number, index, 'phases.jsonl'))
            codes = ended[-1].get('codes', ()) if ended else ()
            if index < len(codes):
                code = codes[index]
                # Of workers whose host or task was lost, nobody has seen the end.
                end = 'its end was not seen' if code is None else f'ended with {code}'
                word = f'{end}, {word.rpartition(",")[0] or word}'
            lines.append(f'worker {index}: {word}')
    newest = dirs.newest_step()
    lines.append(f'newest checkpoint: {f"step {newest}" if newest else "none yet"}')
    return '\n'.join(lines)


def logs(dirs: ModelDir, worker: int = 0, *, follow: bool = False) -> None:
    """Prints what a worker has said in the newest attempt, and with `follow` what it says.

    Raises:
        ConfigError: there is no such log.
    """
    if not dirs.attempts():
        Ledger(dirs.path / 'ledger.jsonl').history()  # Which says what is wrong, if no job ran.
    path = _file(dirs, max(dirs.attempts(), default=0), worker, 'log')
    if not path.exists():
        held = ', '.join(str(each.relative_to(dirs.path)) for each in dirs.logs.glob('*/*.log'))
        raise ConfigError(f'There is no log {str(path)!r}. There is {held or "none"}.')
    with open(path, errors='replace') as file:
        while True:
            text = file.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not text:
                if not follow:
                    return
                time.sleep(_FOLLOW_SECONDS)


def launcher(dirs: ModelDir) -> int | None:
    """Returns the process that brings the job in a directory to its end, None if it has ended.

    Raises:
        ConfigError: no job has run there, or it runs on another host.
    """
    events = Ledger(dirs.path / 'ledger.jsonl').history()
    jobs = [each for each in events if each['event'] == 'job']
    if not jobs or events[-1]['event'] == 'end' or not _runs(jobs[-1]):
        return None
    if jobs[-1]['host'] != socket.gethostname():
        raise ConfigError(
            f'The job in {str(dirs.path)!r} is run by process {jobs[-1]["pid"]} on '
            f'{jobs[-1]["host"]}, and not by a scheduler known here. End it there.'
        )
    return jobs[-1]['pid']


def _file(dirs: ModelDir, attempt: int, worker: int, kind: str) -> Path:
    return dirs.attempt(attempt) / f'worker-{worker}.{kind}'


def _runs(job: dict) -> bool:
    """Whether a launcher is still there; of another host that is taken for granted."""
    try:
        here = job['host'] == socket.gethostname()
        return not here or psutil.Process(job['pid']).create_time() <= job['time'] + 1.0
    except (psutil.Error, KeyError):
        return False


def _last_word(path: Path) -> str:
    lines = json_lines(path)
    steps = [each['step'] for each in lines if 'step' in each]
    if not lines:
        return 'starting'
    last = lines[-1]
    at = f' at step {steps[-1]}' if steps else ''
    return f'{last["phase"]}{at}, {time.time() - last["time"]:.0f} s ago'
