"""The controllers of the stand-in: what Kubernetes makes of JobSets, Jobs and owners.

All are called again and again with the store locked, look at what is there and take one step.
"""

import copy
import dataclasses
import time
import uuid

from tests.cluster.pods import Pods
from tests.cluster.store import Store

_VERSIONS = {
    'pods': 'v1',
    'services': 'v1',
    'jobs': 'batch/v1',
    'jobsets': 'jobset.x-k8s.io/v1alpha2',
}
_INDEX = 'batch.kubernetes.io/job-completion-index'


@dataclasses.dataclass
class _Progress:
    """What the controller knows of a Job: by index its failures, and when a pod may begin."""

    begun: float = dataclasses.field(default_factory=time.monotonic)
    done: set[int] = dataclasses.field(default_factory=set)
    failures: dict[int, int] = dataclasses.field(default_factory=dict)
    wait: dict[int, float] = dataclasses.field(default_factory=dict)
    failing: tuple[str, str] | None = None


class Controllers:
    def __init__(self, store: Store, pods: Pods, backoff_seconds: float):
        self._store, self._pods, self._backoff = store, pods, backoff_seconds
        self._progress: dict[str, _Progress] = {}  # of Jobs by uid

    def reconcile(self) -> None:
        for each in self._store.all('trainjobs'):
            self._train_job(each)
        for each in self._store.all('jobsets'):
            self._job_set(each)
        for each in self._store.all('jobs'):
            self._job(each)
        self._pods.schedule()
        self._collect()

    def _train_job(self, train: dict) -> None:
        """Kubeflow Trainer with a plain runtime: a JobSet of the runtime's template."""
        meta = train['metadata']
        made = self._owned('jobsets', train)
        if not made and not _going(train):
            spec = self._runtime(train)
            meta = {key: meta[key] for key in ('name', 'namespace')}
            made = [self._make('jobsets', 'JobSet', train, {'metadata': meta, 'spec': spec})]
        for each in made:
            _follow(train, each)
            for type_, as_ in (('Completed', 'Complete'), ('Failed', 'Failed')):
                if found := _condition(each, type_):
                    self._set('trainjobs', train, as_, found['reason'], found['message'])

    def _runtime(self, train: dict) -> dict:
        meta, reference = train['metadata'], train['spec']['runtimeRef']
        runtime = self._store.objects['trainingruntimes', meta['namespace'], reference['name']]
        spec = copy.deepcopy(runtime['spec']['template']['spec'])
        job = spec['replicatedJobs'][0]['template']
        assert job['metadata']['labels']['trainer.kubeflow.org/trainjob-ancestor-step'] == 'trainer'
        count = train['spec']['trainer']['numNodes']
        job['spec'].update(completions=count, parallelism=count)
        return {**spec, 'suspend': train['spec'].get('suspend', False)}

    def _job_set(self, found: dict) -> None:
        meta, spec = found['metadata'], found['spec']
        made = self._owned('jobs', found)
        if not made and not _going(found):
            subdomain = spec.get('network', {}).get('subdomain', meta['name'])
            selector = {'jobset.sigs.k8s.io/jobset-name': meta['name']}
            service = {'metadata': {'name': subdomain, 'namespace': meta['namespace']}}
            service['spec'] = {'clusterIP': 'None', 'selector': selector}
            self._make('services', 'Service', found, service)
            for each in spec['replicatedJobs']:
                made.append(self._child(found, each, subdomain, selector))
        for each in made:
            _follow(found, each)
            if done := _condition(each, 'Complete'):
                self._set('jobsets', found, 'Completed', 'AllJobsCompleted', done['message'])
            if failed := _condition(each, 'Failed'):
                said = f'jobset failed due to one or more job failures: {failed["message"]}'
                self._set('jobsets', found, 'Failed', 'FailedJobs', said)

    def _child(self, found: dict, replicated: dict, subdomain: str, selector: dict) -> dict:
        job = copy.deepcopy(replicated['template'])
        job['metadata'].update(
            name=f'{found["metadata"]["name"]}-{replicated["name"]}-0',
            namespace=found['metadata']['namespace'],
        )
        job['metadata'].setdefault('labels', {}).update(selector)
        template = job['spec']['template']
        template['metadata'].setdefault('labels', {}).update(selector)
        template['spec']['subdomain'] = subdomain
        job['spec']['suspend'] = found['spec'].get('suspend', False)
        return self._make('jobs', 'Job', found, job)

    def _job(self, job: dict) -> None:
        spec, meta = job['spec'], job['metadata']
        status = job.setdefault('status', {})
        progress = self._progress.setdefault(meta['uid'], _Progress())
        pods = self._owned('pods', job)
        for pod in pods:
            if _ended(pod) and pod['metadata'].pop('finalizers', None):
                self._count(job, pod)
        active = [each for each in pods if not _ended(each)]
        if status.get('active') != len(active):
            status['active'] = len(active)
            self._store.changed('jobs', job)
        if _condition(job, 'Complete') or _condition(job, 'Failed'):
            return
        limit = spec.get('activeDeadlineSeconds')
        if limit and time.monotonic() - progress.begun > limit:
            progress.failing = (
                'DeadlineExceeded',
                'Job was active longer than specified deadline',
            )
        rules = spec.get('successPolicy', {}).get('rules', [])
        done = len(progress.done) == spec['completions'] or any(
            int(rule['succeededIndexes']) in progress.done for rule in rules
        )
        if done or progress.failing or spec.get('suspend') or _going(job):
            for pod in active:
                self._pods.delete(pod)
            if not active and done:
                self._set('jobs', job, 'Complete', 'CompletionsReached', 'Reached expected pods')
            elif not active and progress.failing:
                self._set('jobs', job, 'Failed', *progress.failing)
            return
        for index in range(spec['completions']):
            # As podReplacementPolicy: Failed has it, also for one that is going.
            there = any(_index(each) == index for each in active)
            waits = progress.wait.get(index, 0) > time.monotonic()
            if not there and not waits and index not in progress.done:
                self._start(job, index)

    def _count(self, job: dict, pod: dict) -> None:
        """What the end of a pod means for its Job."""
        index, status = _index(pod), job['status']
        progress = self._progress[job['metadata']['uid']]
        if pod['status']['phase'] == 'Succeeded':
            progress.done.add(index)
            status['succeeded'] = len(progress.done)
            return
        terminated = pod['status']['containerStatuses'][0]['state']['terminated']
        for number, rule in enumerate(job['spec']['podFailurePolicy']['rules']):
            codes = rule.get('onExitCodes', {}).get('values', [])
            conditions = [each['type'] for each in rule.get('onPodConditions', [])]
            if terminated['exitCode'] in codes:
                assert rule['action'] == 'FailJob'
                said = (
                    f'Container {pod["spec"]["containers"][0]["name"]} for pod '
                    f'{pod["metadata"]["namespace"]}/{pod["metadata"]["name"]} failed with exit '
                    f'code {terminated["exitCode"]} matching FailJob rule at index {number}'
                )
                progress.failing = ('PodFailurePolicy', said)
                return
            if any(_condition(pod, each) for each in conditions):
                assert rule['action'] == 'Ignore'
                return
        status['failed'] = status.get('failed', 0) + 1
        failures = progress.failures[index] = progress.failures.get(index, 0) + 1
        progress.wait[index] = time.monotonic() + self._backoff * 2 ** (failures - 1)
        if failures > job['spec']['backoffLimitPerIndex']:
            said = 'Job has exceeded the specified maximal number of failed indexes'
            progress.failing = ('MaxFailedIndexesExceeded', said)

    def _start(self, job: dict, index: int) -> None:
        pod = copy.deepcopy(job['spec']['template'])
        name, meta = job['metadata']['name'], pod.setdefault('metadata', {})
        meta.update(
            name=f'{name}-{index}-{uuid.uuid4().hex[:5]}',
            namespace=job['metadata']['namespace'],
            finalizers=['batch.kubernetes.io/job-tracking'],
        )
        meta.setdefault('labels', {})['batch.kubernetes.io/job-name'] = name
        meta.setdefault('annotations', {})[_INDEX] = str(index)
        pod['spec']['hostname'] = f'{name}-{index}'
        source = {'fieldRef': {'fieldPath': f"metadata.annotations['{_INDEX}']"}}
        for container in pod['spec']['containers']:
            container.setdefault('env', []).append(
                {'name': 'JOB_COMPLETION_INDEX', 'valueFrom': source}
            )
        pod['status'] = {'phase': 'Pending'}
        self._make('pods', 'Pod', job, pod)

    def _make(self, plural: str, kind: str, owner: dict, found: dict) -> dict:
        found.update(kind=kind, apiVersion=_VERSIONS[plural])
        meta = owner['metadata']
        reference = {'kind': owner['kind'], 'name': meta['name'], 'uid': meta['uid']}
        found['metadata']['ownerReferences'] = [{**reference, 'controller': True}]
        return self._store.add(plural, found)

    def _owned(self, plural: str, owner: dict) -> list[dict]:
        return self._store.all(plural, lambda each: owner['metadata']['uid'] in _owners(each))

    def _set(self, plural: str, found: dict, type_: str, reason: str, message: str) -> None:
        if not _condition(found, type_):
            one = {'type': type_, 'status': 'True', 'reason': reason, 'message': message}
            found.setdefault('status', {}).setdefault('conditions', []).append(one)
            self._store.changed(plural, found)

    def _collect(self) -> None:
        """The garbage collector."""
        there = list(self._store.objects.items())
        uids = {each['metadata']['uid'] for _, each in there}
        going = {each['metadata']['uid'] for _, each in there if _going(each)}
        for (plural, *_), each in there:
            owners, meta = _owners(each), each['metadata']
            # As long as the Job is there, it wants to have counted its pods.
            tracked = owners & uids and meta.get('finalizers')
            if owners and not (owners & uids - going):
                # Its owner is gone, or is going and waits for it.
                if plural == 'pods' and not _ended(each):
                    self._pods.delete(each)
                else:
                    meta.setdefault('deletionTimestamp', '1970-01-01T00:00:00Z')
            waits = tracked or (plural == 'pods' and not _ended(each))
            if _going(each) and not waits and not self._owned_by_any(meta['uid'], there):
                self._store.remove(plural, each)

    @staticmethod
    def _owned_by_any(uid: str, there: list) -> bool:
        return any(uid in _owners(each) for _, each in there)


def _follow(owner: dict, child: dict) -> None:
    """Suspends with its owner what the owner has made, and lets it go on with it."""
    child['spec']['suspend'] = owner['spec'].get('suspend', False)


def _condition(found: dict, type_: str) -> dict | None:
    for each in found.get('status', {}).get('conditions', []):
        if each['type'] == type_ and each['status'] == 'True':
            return each
    return None


def _ended(pod: dict) -> bool:
    return pod['status'].get('phase') in ('Succeeded', 'Failed')


def _going(found: dict) -> bool:
    return 'deletionTimestamp' in found['metadata']


def _index(pod: dict) -> int:
    return int(pod['metadata']['annotations'][_INDEX])


def _owners(found: dict) -> set[str]:
    return {each['uid'] for each in found['metadata'].get('ownerReferences', [])}
