"""Kubernetes: a job is a JobSet, an Indexed Job or a TrainJob, with a pod for each host."""

import contextlib
import dataclasses
import sys
import time
import urllib.parse
from collections.abc import Iterator

from launch.backends import Status, Submitted, kubernetes_plan
from launch.backends.kubernetes_api import Cluster, Gone
from launch.backends.kubernetes_options import KubernetesOptions, define_flags, from_flags
from launch.backends.kubernetes_pod import Manifest, labels
from launch.backends.kubernetes_status import Seen, by_rank, ended, status
from launch.job import Job
from trainer.errors import ConfigError, nearest

__all__ = ['Kubernetes', 'KubernetesOptions', 'define_flags', 'from_flags']

_KINDS = {'job': 'Job', 'jobset': 'JobSet', 'trainjob': 'TrainJob'}
# The deleted job of that name may still be saving.
_LONGEST_FAREWELL_SECONDS = 180.0
_POLL_SECONDS = 1.0
_UNDER_WAY = ('pending', 'running', 'cancelled')


class Kubernetes:
    """The back end; without options, for what has been submitted."""

    def __init__(self, options: KubernetesOptions | None = None):
        self._options = options or KubernetesOptions()

    def plan(self, job: Job) -> str:
        """Returns the manifests as YAML.

        Raises:
            ConfigError: Kubernetes cannot run such a job.
        """
        text = kubernetes_plan.text(kubernetes_plan.manifests(job, self._options))
        if self._options.kind == 'auto':
            text = f'# A Job instead of the JobSet where the cluster knows no JobSets.\n{text}'
        return text

    def submit(self, job: Job) -> str:
        """Makes the objects of a plan, the job last, and returns its handle.

        A job of that name that has ended, or is being deleted, makes room.

        Raises:
            ConfigError: the cluster refuses it, or a job of that name is at work.
            Unreachable: the cluster does not answer.
        """
        kubernetes_plan.manifests(job, self._options)  # Mistakes come first.
        cluster = Cluster(self._options.context, self._options.namespace)
        documents = kubernetes_plan.manifests(job, self._for(cluster))
        self._make_room(cluster, job.name)
        made: list[Manifest] = []
        try:
            for document in documents:
                made.append(cluster.create(document))
        except BaseException:
            for document in made:
                with contextlib.suppress(Exception):
                    cluster.delete(document['kind'], document['metadata']['name'])
            raise
        for document in made[:-1]:
            # The job is on its way. `cancel` finds what is left by its labels, too.
            with contextlib.suppress(Exception):
                cluster.own(document, made[-1])
        return _handle(cluster, documents[-1]['kind'], job.name)

    def status(self, submitted: Submitted) -> Status:
        """Returns how a job stands.

        Raises:
            ConfigError: there is no such job.
            Unreachable: the cluster does not answer.
        """
        cluster, kind, name = _parse(submitted)
        try:
            return status(_look(cluster, kind, name))
        except Gone:
            raise _no_job(submitted) from None

    def logs(
        self, submitted: Submitted, worker: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Yields what the pod of a worker prints, or without `worker` what the leader's does, one
        after the other if it was replaced.

        Raises:
            ConfigError: there is no such job or worker.
            Unreachable: the cluster does not answer.
        """
        cluster, kind, name = _parse(submitted)
        try:
            seen = _look(cluster, kind, name)
        except Gone:
            raise _no_job(submitted) from None
        rank = _rank_of(worker or 0, seen.main)
        done: set[str] = set()
        # Until the job is gone, as after `phalanx cancel`.
        with contextlib.suppress(Gone):
            while True:
                new = _next(seen, rank, done)
                if new is not None:
                    done.add(new['metadata']['uid'])
                    with contextlib.suppress(Gone):
                        yield from _log(cluster, new, follow)
                elif not follow or status(seen).state not in _UNDER_WAY:
                    return
                else:
                    time.sleep(_POLL_SECONDS)
                seen = _look(cluster, kind, name)

    def cancel(self, submitted: Submitted) -> None:
        """Deletes a job with all that belongs to it; its pods save and end.

        Raises:
            Unreachable: the cluster does not answer.
        """
        cluster, kind, name = _parse(submitted)
        cluster.delete(kind, name)
        _sweep(cluster, name)

    def _for(self, cluster: Cluster) -> KubernetesOptions:
        """The options, with a kind that the cluster knows."""
        kind = self._options.kind
        if kind == 'auto':
            kind = 'jobset' if cluster.knows('JobSet') else 'job'
            if kind == 'job':
                print(
                    f'phalanx: the cluster {cluster.context} knows no JobSets; this is a Job',
                    file=sys.stderr,
                )
        elif not cluster.knows(_KINDS[kind]):
            mend = 'Install Kubeflow Trainer v2 or take another --kube_kind.'
            if kind == 'jobset':
                mend = 'Install it (https://jobset.sigs.k8s.io), or give --kube_kind=job.'
            raise ConfigError(f'The cluster {cluster.context} knows no {_KINDS[kind]}s. {mend}')
        return dataclasses.replace(self._options, kind=kind)

    def _make_room(self, cluster: Cluster, name: str) -> None:
        """Waits for a job of the same name to go, if it has ended.

        Raises:
            ConfigError: it has not, or it does not go.
        """
        end = time.monotonic() + _LONGEST_FAREWELL_SECONDS
        while there := _mains(cluster, name):
            for kind, old in there:
                if status(Seen(old)).state in ('pending', 'running'):
                    raise ConfigError(
                        f'There is a {kind} {name} in {cluster.namespace} that has not ended: '
                        f'{_handle(cluster, kind, name)}. `phalanx cancel` has it save and end; or '
                        'choose another --name.'
                    )
                if 'deletionTimestamp' not in old['metadata']:
                    cluster.delete(kind, name)
            if time.monotonic() > end:
                raise ConfigError(
                    f'The {there[0][0]} {name} of before is still being deleted: its pods have not '
                    'ended. Wait for them, or choose another --name.'
                )
            time.sleep(_POLL_SECONDS)
        _sweep(cluster, name)


def _mains(cluster: Cluster, name: str) -> list[tuple[str, Manifest]]:
    """The jobs of a name, of any kind, but for what they have made themselves."""
    return [(kind, each) for kind in _KINDS.values() for each in _unowned(cluster, kind, name)]


def _unowned(cluster: Cluster, kind: str, name: str) -> list[Manifest]:
    # Who may not ask for a kind cannot have made one.
    with contextlib.suppress(ConfigError):
        found = cluster.objects(kind, labels(name))
        return [each for each in found if not each['metadata'].get('ownerReferences')]
    return []


def _sweep(cluster: Cluster, name: str) -> None:
    """Deletes what is left of a job, where nobody owned it."""
    for kind in ('ConfigMap', 'Service', 'Deployment', 'TrainingRuntime'):
        for each in _unowned(cluster, kind, name):
            cluster.delete(kind, each['metadata']['name'])


def _look(cluster: Cluster, kind: str, name: str) -> Seen:
    """Asks for all that there is of a job.

    Raises:
        Gone: there is no such job.
    """
    main = cluster.get(kind, name)
    jobs = [main] if kind == 'Job' else cluster.objects('Job', labels(name))
    pods = cluster.pods(labels(name, 'worker'))
    uids = {each['metadata']['uid'] for each in (main, *jobs, *pods)}
    workload, no_queue, warnings = None, False, []
    if main['spec'].get('suspend'):
        try:
            workload = cluster.workload(main['metadata']['uid'])
        except Gone:
            no_queue = True
        except ConfigError:
            pass  # Not everybody may read them, and the job waits all the same.
    with contextlib.suppress(ConfigError):
        warnings = cluster.warnings(uids)
    return Seen(main, jobs, pods, warnings, workload, no_queue, time.time())


def _rank_of(worker: int, main: Manifest) -> int:
    """The rank of the pod that has a worker."""
    told = main['metadata'].get('annotations', {})
    count = int(told.get(kubernetes_plan.WORKERS, 1))
    if not 0 <= worker < count:
        raise ConfigError(f'There is no worker {worker}: the job has {count}, counted from 0.')
    return worker // int(told.get(kubernetes_plan.WORKERS_PER_HOST, 1))


def _next(seen: Seen, rank: int, done: set[str]) -> Manifest | None:
    """The oldest pod of a rank that has begun and whose log has not been read."""
    for pod in by_rank(seen.pods).get(rank, []):
        if pod['metadata']['uid'] not in done and pod['status'].get('phase') != 'Pending':
            return pod
    return None


def _no_job(submitted: Submitted) -> ConfigError:
    return ConfigError(
        f'There is no job {submitted.handle}: it was deleted, or a week has passed since its end.'
    )


def _log(cluster: Cluster, pod: Manifest, follow: bool) -> Iterator[str]:
    """Yields what a pod prints; raises Gone if it is deleted meanwhile."""
    name, container = pod['metadata']['name'], pod['spec']['containers'][0]['name']
    log = cluster.log(name, container)
    while follow and not ended(pod):
        yield from log.lines(follow=True)
        pod = cluster.get('Pod', name)
    yield from log.lines(follow=False)


def _handle(cluster: Cluster, kind: str, name: str) -> str:
    parts = (cluster.context, cluster.namespace, kind.lower(), name)
    # Names of contexts have slashes and colons in them.
    return 'k8s://' + '/'.join(urllib.parse.quote(each, safe='') for each in parts)


def _parse(submitted: Submitted) -> tuple[Cluster, str, str]:
    """The cluster, the kind and the name of a handle."""
    parts = [urllib.parse.unquote(each) for each in submitted.handle[len('k8s://') :].split('/')]
    if len(parts) != 4 or parts[2] not in _KINDS:
        kinds = ', '.join(_KINDS)
        mend = nearest(parts[2], _KINDS) if len(parts) == 4 else ''
        raise ConfigError(
            f'{submitted.handle} is no job of Kubernetes: such a handle is '
            f'k8s://CONTEXT/NAMESPACE/KIND/NAME, with one of {kinds} for a kind.{mend}'
        )
    context, namespace, kind, name = parts
    return Cluster(context, namespace), _KINDS[kind], name
