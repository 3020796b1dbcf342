"""Which workers a job has, and which one of them this process is: TF_CONFIG, read strictly."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from trainer.errors import ConfigError, nearest

_EXAMPLE = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a job and this process's place among them.

    Attributes:
        workers: every worker's 'host:port' in order, the chief first; empty for a job of one
            process.
        index: this worker's place in `workers`.
        type: 'worker', or 'evaluator' for the process that evaluates beside a training job.
    """

    workers: tuple[str, ...] = ()
    index: int = 0
    type: str = 'worker'

    @property
    def num_workers(self) -> int:
        """Number of workers that train together, this one included."""
        return max(1, len(self.workers))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes what is written once: worker 0 does, an evaluator too."""
        return self.index == 0

    def names(self, indices: Sequence[int]) -> str:
        """Returns workers for people: 'worker 1 (host1:2222), worker 3 (host3:2222)'."""
        return ', '.join(f'worker {i} ({self.workers[i]})' for i in sorted(indices))


def from_environ(environ: Mapping[str, str] = os.environ) -> Cluster:
    """Reads the cluster from TF_CONFIG; without it the job is this one process.

    Args:
        environ: environment variables.

    Returns:
        The cluster. A 'chief' job counts as worker 0, the 'worker' job follows it; an
        'evaluator' is a cluster of its own.

    Raises:
        ConfigError: TF_CONFIG is not valid JSON, lacks a key or contradicts itself.
    """
    text = environ.get('TF_CONFIG', '{}')
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _wrong(f'is not valid JSON ({error})', text) from None
    if config == {}:
        return Cluster()
    jobs, task = _member(config, 'cluster', 'it'), _member(config, 'task', 'it')
    kind, index = _member(task, 'type', "its 'task'"), _member(task, 'index', "its 'task'")
    if not isinstance(jobs, dict):
        raise _wrong("'cluster' is not an object of jobs", jobs)
    if kind == 'ps' or 'ps' in jobs:
        raise _wrong(
            "has a 'ps' job, but training is synchronous and has no parameter servers", text
        )
    for job in (*jobs, kind):
        if job not in ('chief', 'worker', 'evaluator'):
            mend = nearest(str(job), ('chief', 'worker', 'evaluator'))
            raise _wrong(f"has a job that is none of 'chief', 'worker', 'evaluator'.{mend}", job)
    if isinstance(index, bool) or not str(index).isdigit():
        raise _wrong("has a 'task' whose 'index' is not a whole number from 0 on", index)
    index = int(index)

    workers = (*_addresses(jobs, 'chief'), *_addresses(jobs, 'worker'))
    if kind == 'evaluator':
        if index:
            raise _wrong("has an 'evaluator' that is not the only one (index 0)", index)
        return Cluster(type='evaluator')
    if len(jobs.get('chief', ())) > 1:
        raise _wrong("has more than one 'chief'", jobs['chief'])
    again = sorted({address for address in workers if workers.count(address) > 1})
    if again:
        raise _wrong('gives one address to two workers', again[0])
    if index >= len(jobs.get(kind, ())):
        there = f'{len(jobs.get(kind, ()))} of them'
        raise _wrong(f'has a task index beyond its {kind!r} job ({there}, counted from 0)', index)
    return Cluster(workers, index + len(jobs.get('chief', ())) if kind == 'worker' else 0)


def _wrong(what: str, value: object) -> ConfigError:
    value = value if isinstance(value, str) and value else json.dumps(value)
    return ConfigError(f'TF_CONFIG {what}: {value}\nA right one: {_EXAMPLE}')


def _member(mapping: object, key: str, where: str) -> object:
    if not isinstance(mapping, dict):
        raise _wrong(f'is wrong: {where} is not an object', mapping)
    if key not in mapping:
        raise _wrong(f'is wrong: {where} lacks {key!r}', mapping)
    return mapping[key]


def _addresses(jobs: Mapping[str, object], job: str) -> list[str]:
    addresses = jobs.get(job, [])
    if not isinstance(addresses, list):
        raise _wrong(f'has a {job!r} job that is not a list of addresses', addresses)
    for address in addresses:
        host, _, port = address.rpartition(':') if isinstance(address, str) else ('', '', '')
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise _wrong(f"has a {job!r} address that is not 'host:port'", address)
    return addresses
