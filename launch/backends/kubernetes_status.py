"""How a job stands in Kubernetes, from its objects; pure, so that every case can be tried."""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from launch.backends import Status, Task
from launch.backends.kubernetes_pod import Manifest

_INDEX = 'batch.kubernetes.io/job-completion-index'
# Why a container waits that will not start by itself; the others of these may be a registry or a
# Secret that is just late.
_HOPELESS = ('InvalidImageName', 'ErrImageNeverPull')
_DOUBTFUL = (
    'CreateContainerConfigError',
    'CreateContainerError',
    'ErrImagePull',
    'ImageInspectError',
    'ImagePullBackOff',
    'RegistryUnavailable',
    'RunContainerError',
)
_PATIENCE_SECONDS = 120.0
_PHASES = {'Pending': 'pending', 'Running': 'running', 'Succeeded': 'finished'}
_STOPPED = 75
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a cluster says of a job at one time.

    Attributes:
        main: the JobSet, Job or TrainJob.
        jobs: the Jobs that belong to it, or itself.
        pods: all of its pods that are still there.
        warnings: events about any of them, the oldest first.
        workload: what Kueue says of it, if it waits there.
        no_queue: it waits for Kueue, which is not there.
        now: seconds since 1970.
    """

    main: Manifest
    jobs: Sequence[Manifest] = ()
    pods: Sequence[Manifest] = ()
    warnings: Sequence[Manifest] = ()
    workload: Manifest | None = None
    no_queue: bool = False
    now: float = 0.0


def status(seen: Seen) -> Status:
    """Returns how the job stands."""
    newest = by_rank(seen.pods)
    tasks = tuple(_task(rank, pods[-1], seen) for rank, pods in sorted(newest.items()))
    state, reason, never = _state(seen, tasks)
    return Status(state, _short(reason), never, _restarts(seen, tasks), tasks)


def by_rank(pods: Iterable[Manifest]) -> dict[int, list[Manifest]]:
    """Returns the pods of each rank, the oldest first."""
    found: dict[int, list[Manifest]] = {}
    for pod in sorted(pods, key=lambda each: each['metadata']['creationTimestamp']):
        found.setdefault(rank(pod), []).append(pod)
    return found


def rank(pod: Manifest) -> int:
    """Returns the rank of a pod's task."""
    return int(pod['metadata'].get('annotations', {}).get(_INDEX, 0))


def ended(pod: Manifest) -> bool:
    """Whether a pod's container has ended for good."""
    return pod.get('status', {}).get('phase') in ('Succeeded', 'Failed')


def _state(seen: Seen, tasks: Sequence[Task]) -> tuple[str, str, bool]:
    if 'deletionTimestamp' in seen.main['metadata']:
        return 'cancelled', 'it is being deleted; its pods save and end', False
    if over := _over(seen, tasks):
        return *over, False
    if seen.main.get('spec', {}).get('suspend'):
        return 'pending', *_waits_in_queue(seen)
    waiting = [each for each in tasks if each.state == 'pending']
    never = any(_never(pods[-1], seen) for pods in by_rank(seen.pods).values())
    told = '; '.join(dict.fromkeys(each.reason for each in waiting if each.reason))
    if any(each.state == 'running' for each in tasks):
        ranks = ', '.join(str(each.rank) for each in waiting)
        return 'running', f'waiting for rank {ranks}: {told}' if told else '', never
    if not tasks and seen.warnings:
        last = seen.warnings[-1]
        # Quotas, policies and missing accounts: what asks again gets the same answer.
        return 'pending', last.get('message', ''), 'forbidden' in last.get('message', '')
    return 'pending', told, never


def _over(seen: Seen, tasks: Sequence[Task]) -> tuple[str, str] | None:
    """How the job has ended, and why; None if it has not."""
    if _condition(seen.main, 'Complete', 'Completed'):
        return 'finished', ''
    if not (failed := _condition(seen.main, 'Failed')):
        return None
    # The Job knows more than its JobSet.
    cause = next(filter(None, (_condition(job, 'Failed') for job in seen.jobs)), failed)
    said = f'{cause.get("reason", "")}: {cause.get("message", "")}'.strip(': ')
    if cause.get('reason') == 'DeadlineExceeded':
        return 'stopped', f'its time limit has passed ({said})'
    bad = [each for each in tasks if each.state in ('failed', 'stopped')]
    if bad and all(each.state == 'stopped' for each in bad):
        return 'stopped', said
    return 'failed', said


def _waits_in_queue(seen: Seen) -> tuple[str, bool]:
    queue = seen.main['metadata'].get('labels', {}).get('kueue.x-k8s.io/queue-name')
    if not queue:
        return 'suspended', True
    if seen.no_queue:
        return f'it waits for the queue {queue} of Kueue, which this cluster does not have', True
    reserved = _find(seen.workload or {}, 'QuotaReserved') or {}
    said = reserved.get('message', '')
    never = reserved.get('reason') in ('Inadmissible', 'Misconfigured')
    return f'it waits in the queue {queue} of Kueue{f": {said}" if said else ""}', never


def _task(rank: int, pod: Manifest, seen: Seen) -> Task:
    found, terminated = pod.get('status', {}), _container(pod, 'terminated')
    phase, code = found.get('phase'), terminated.get('exitCode')
    state = _PHASES.get(phase, 'unknown')
    if phase == 'Failed':
        state = 'stopped' if code == _STOPPED else 'failed'
    host = pod.get('spec', {}).get('nodeName', '')
    return Task(rank, state, host, code, _short(_why(pod, state, seen)))


def _why(pod: Manifest, state: str, seen: Seen) -> str:
    if disrupted := _condition(pod, 'DisruptionTarget'):
        return f'{disrupted.get("reason", "")}: {disrupted.get("message", "")}'.strip(': ')
    if 'deletionTimestamp' in pod['metadata']:
        return 'it is being deleted'
    if state == 'failed':
        terminated = _container(pod, 'terminated')
        said = terminated.get('reason', '')
        said = '' if said == 'Error' else said
        # Of a container: its last lines.
        lines = terminated.get('message', '').strip().splitlines()
        return said or pod['status'].get('message', '') or (lines[-1] if lines else '')
    if state != 'pending':
        return ''
    if (scheduled := _find(pod, 'PodScheduled')) and scheduled.get('status') == 'False':
        return f'{scheduled.get("reason", "")}: {scheduled.get("message", "")}'.strip(': ')
    waiting = _container(pod, 'waiting')
    told = [w for w in seen.warnings if w['involvedObject'].get('uid') == pod['metadata']['uid']]
    said = waiting.get('message') or (told[-1].get('message', '') if told else '')
    return f'{waiting.get("reason", "")}: {said}'.strip(': ')


def _never(pod: Manifest, seen: Seen) -> bool:
    """Whether a pod waits for what will not come by itself."""
    if pod.get('status', {}).get('phase') != 'Pending':
        return False
    reason = _container(pod, 'waiting').get('reason')
    age = seen.now - _seconds(pod['metadata']['creationTimestamp'])
    scheduled = _find(pod, 'PodScheduled') or {}
    lacks_claim = 'persistentvolumeclaim' in scheduled.get('message', '') and (
        'not found' in scheduled['message']
    )
    doubtful = reason in _DOUBTFUL or lacks_claim
    return reason in _HOPELESS or (doubtful and age > _PATIENCE_SECONDS)


def _restarts(seen: Seen, tasks: Sequence[Task]) -> int:
    """How often a pod has been replaced, as far as the Jobs count it, or the whole set."""
    failed = sum(job.get('status', {}).get('failed', 0) for job in seen.jobs)
    for_good = sum(each.state in ('failed', 'stopped') for each in tasks)
    there = sum(len(pods) - 1 for pods in by_rank(seen.pods).values())
    return seen.main.get('status', {}).get('restarts', 0) + max(failed - for_good, there, 0)


def _condition(found: Manifest, *types: str) -> Manifest | None:
    """The condition of an object that is true, if it has one of these."""
    for each in found.get('status', {}).get('conditions', []):
        if each['type'] in types and each['status'] == 'True':
            return each
    return None


def _find(found: Manifest, type_: str) -> Manifest | None:
    """A condition of an object, whether it is true or not."""
    conditions = found.get('status', {}).get('conditions', [])
    return next((each for each in conditions if each['type'] == type_), None)


def _container(pod: Manifest, state: str) -> dict[str, Any]:
    """The details of a state that the container of a pod is in; {} if it is in another."""
    for each in pod.get('status', {}).get('containerStatuses', []):
        return each.get('state', {}).get(state) or {}
    return {}


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace('Z', '+00:00')).timestamp()


def _short(text: str) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= _LONGEST_REASON else f'{text[: _LONGEST_REASON - 3]}...'
