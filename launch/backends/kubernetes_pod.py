"""The pods of a job: what runs in them, what they mount and where they may run."""

import math
from typing import Any

from launch.backends.kubernetes_options import KubernetesOptions, Volume
from launch.job import Job

Manifest = dict[str, Any]

CONFIG_DIRECTORY = '/etc/phalanx'
CONFIG_FILE = 'config.json'
# Pods have addresses of their own, so all jobs may use the same.
PORT = 7300
TENSORBOARD_PORT = 6006
# Kubernetes' own 300 s are all that the hosts of a job wait for each other.
_LOST_NODE_SECONDS = 30
# Between the end of the workers and that of their task.
_SPARE_SECONDS = 30


def labels(name: str, component: str = '') -> dict[str, str]:
    """Returns the labels of what belongs to a job; without a component, those of all of it."""
    found = {
        'app.kubernetes.io/managed-by': 'phalanx',
        'app.kubernetes.io/instance': name,
    }
    return {**found, 'app.kubernetes.io/component': component} if component else found


def escape(value: str) -> str:
    """Returns a text that arrives as it was: of '$(NAME)' Kubernetes makes the variable's value.

    Two dollars are one in commands, arguments and variables of the environment.
    https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container/
    """
    return value.replace('$', '$$')


def leader(job: Job, options: KubernetesOptions) -> str:
    """Returns the DNS name of the pod of rank 0, within its namespace."""
    return f'{host_names(job, options)}-0.{job.name}'


def host_names(job: Job, options: KubernetesOptions) -> str:
    """Returns what the host names of the pods have in common: theirs is it, a dash and the rank."""
    if options.kind == 'job':
        return job.name
    return f'{job.name}-{replicated_job(options)}-0'


def replicated_job(options: KubernetesOptions) -> str:
    """Returns the name of the Job among those of its JobSet."""
    return 'node' if options.kind == 'trainjob' else 'workers'


def container_name(options: KubernetesOptions) -> str:
    """Returns the name of the container that trains."""
    # Kubeflow Trainer looks for the name `node` in what it shall start.
    return 'node' if options.kind == 'trainjob' else 'worker'


def template(job: Job, options: KubernetesOptions) -> Manifest:
    """Returns the template of the pods that train."""
    metadata: Manifest = {'labels': {**dict(options.labels), **labels(job.name, 'worker')}}
    if options.annotations:
        metadata['annotations'] = dict(options.annotations)
    spec: Manifest = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': math.ceil(job.policy.grace_seconds) + _SPARE_SECONDS,
    }
    if options.kind == 'job':
        spec['subdomain'] = job.name
    spec |= _pod_options(options)
    spec['tolerations'] = [*_lost_nodes(), *_tolerations(options)]
    if options.node_selector:
        spec['nodeSelector'] = dict(options.node_selector)
    spec['containers'] = [_container(job, options)]
    config = {'name': 'config', 'configMap': {'name': f'{job.name}-config'}}
    spec['volumes'] = [config, *_volumes(options), *_shm(job, options)]
    return {'metadata': metadata, 'spec': spec}


def _pod_options(options: KubernetesOptions) -> Manifest:
    # A namespace with many Services would put hundreds of variables into each pod.
    found: Manifest = {'enableServiceLinks': False}
    if options.service_account:
        found['serviceAccountName'] = options.service_account
    else:
        found['automountServiceAccountToken'] = False
    if options.pull_secrets:
        found['imagePullSecrets'] = [{'name': name} for name in options.pull_secrets]
    return found


def _lost_nodes() -> list[Manifest]:
    return [
        {
            'key': f'node.kubernetes.io/{state}',
            'operator': 'Exists',
            'effect': 'NoExecute',
            'tolerationSeconds': _LOST_NODE_SECONDS,
        }
        for state in ('not-ready', 'unreachable')
    ]


def _tolerations(options: KubernetesOptions) -> list[Manifest]:
    found = []
    for key, value, effect in options.tolerations:
        one = {'key': key, 'operator': 'Exists'}
        if value is not None:
            one = {'key': key, 'operator': 'Equal', 'value': value}
        found.append({**one, **({'effect': effect} if effect else {})})
    return found


def _container(job: Job, options: KubernetesOptions) -> Manifest:
    command = job.command('kubernetes', f'{CONFIG_DIRECTORY}/{CONFIG_FILE}')
    environment = {
        # A container sees all cores of its node, whatever it asked for; and bits depend on how many
        # threads compute them.
        **({'TF_NUM_INTRAOP_THREADS': str(job.resources.cpus)} if job.resources.cpus else {}),
        **job.environment,
        'PHALANX_HOSTS': str(job.hosts),
        'PHALANX_LEADER': leader(job, options),
        'PHALANX_PORT': str(PORT),
    }
    found: Manifest = {
        'name': container_name(options),
        'image': options.image,
        'command': [escape(each) for each in [*command, '--tee']],
        'workingDir': job.directory,
        'env': [{'name': name, 'value': escape(each)} for name, each in environment.items()],
    }
    if options.secrets:
        found['envFrom'] = [{'secretRef': {'name': name}} for name in options.secrets]
    found['ports'] = [{'name': 'phalanx', 'containerPort': PORT, 'protocol': 'TCP'}]
    if resources := _resources(job, options):
        found['resources'] = resources
    # The last lines of a pod that failed are in its status, also where its log is gone.
    found['terminationMessagePolicy'] = 'FallbackToLogsOnError'
    found['volumeMounts'] = [
        {'name': 'config', 'mountPath': CONFIG_DIRECTORY, 'readOnly': True},
        *_mounts(options),
        *({'name': each['name'], 'mountPath': '/dev/shm'} for each in _shm(job, options)),
    ]
    return found


def _resources(job: Job, options: KubernetesOptions) -> Manifest:
    needs, count = job.resources, job.workers_per_host
    requests, limits = {}, {}
    # No limit of cores: it would throttle, and a worker knows how many it may use.
    if needs.cpus is not None:
        requests['cpu'] = str(needs.cpus * count)
    if needs.memory_mb is not None:
        requests['memory'] = limits['memory'] = f'{needs.memory_mb * count}Mi'
    if needs.gpus:
        requests[options.gpu_resource] = limits[options.gpu_resource] = str(needs.gpus * count)
    return {
        **({'requests': requests} if requests else {}),
        **({'limits': limits} if limits else {}),
    }


def _volumes(options: KubernetesOptions) -> list[Manifest]:
    return [
        {'name': f'volume-{index}', **_source(each)} for index, each in enumerate(options.volumes)
    ]


def _source(volume: Volume) -> Manifest:
    if volume.source == 'empty':
        return {'emptyDir': {}}
    if volume.source.startswith('nfs://'):
        server, _, export = volume.source.removeprefix('nfs://').partition('/')
        return {'nfs': {'server': server, 'path': f'/{export}'}}
    return {'persistentVolumeClaim': {'claimName': volume.source}}


def _mounts(options: KubernetesOptions) -> list[Manifest]:
    return [
        {
            'name': f'volume-{index}',
            'mountPath': each.path,
            **({'readOnly': True} if each.read_only else {}),
        }
        for index, each in enumerate(options.volumes)
    ]


def _shm(job: Job, options: KubernetesOptions) -> list[Manifest]:
    """NCCL goes through /dev/shm between the GPUs of a host, and runtimes give it 64 MiB."""
    if options.shm_mb is None and not job.resources.gpus:
        return []
    size = {} if options.shm_mb is None else {'sizeLimit': f'{options.shm_mb}Mi'}
    return [{'name': 'shm', 'emptyDir': {'medium': 'Memory', **size}}]


def tensorboard(job: Job, options: KubernetesOptions) -> Manifest:
    """Returns the template of the pod that shows the curves of a job."""
    command = [job.python, '-m', 'tensorboard.main', f'--logdir={job.model_dir}', '--bind_all']
    container = {
        'name': 'tensorboard',
        'image': options.image,
        'command': [escape(each) for each in [*command, f'--port={TENSORBOARD_PORT}']],
        'ports': [{'name': 'http', 'containerPort': TENSORBOARD_PORT, 'protocol': 'TCP'}],
        'readinessProbe': {'httpGet': {'path': '/', 'port': 'http'}},
        'volumeMounts': [{**each, 'readOnly': True} for each in _mounts(options)],
    }
    return {
        'metadata': {'labels': {**dict(options.labels), **labels(job.name, 'tensorboard')}},
        'spec': {
            **_pod_options(options),
            'containers': [container],
            'volumes': _volumes(options),
        },
    }
