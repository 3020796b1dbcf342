"""What a job is to Kubernetes: its manifests, as a pure function of the job and the options.

The pods of a job are those of one Indexed Job, a pod a host. Its fields need Kubernetes 1.31 or
later, where all of them are on by default: podFailurePolicy (since 1.26), backoffLimitPerIndex and
podReplacementPolicy (1.29), successPolicy (1.31).
https://kubernetes.io/docs/concepts/workloads/controllers/job/
"""

import json
import math
import re

from launch.backends import kubernetes_pod as pod
from launch.backends.kubernetes_options import KubernetesOptions
from launch.backends.kubernetes_pod import Manifest, labels
from launch.job import Job
from trainer.errors import ConfigError

# Annotations: how many workers there are, and how many of them a pod has.
WORKERS, WORKERS_PER_HOST = 'phalanx/workers', 'phalanx/workers-per-host'
_WEEK_SECONDS = 7 * 24 * 3600
_MOST_CONFIG_BYTES = 1 << 20
_LONGEST_LABEL = 63
_RANDOM_SUFFIX = '-abcde'  # of the name of a pod
_OURS = ('JOB_COMPLETION_INDEX', 'PHALANX_HOSTS', 'PHALANX_LEADER', 'PHALANX_PORT')


def manifests(job: Job, options: KubernetesOptions) -> list[Manifest]:
    """Returns what has to be made, the job itself last: once that is there, nothing can fail.

    Raises:
        ConfigError: Kubernetes cannot run such a job.
    """
    _check(job, options)
    found = [_config_map(job, options)]
    if options.tensorboard:
        found += _tensorboard(job, options)
    if options.kind == 'job':
        return [*found, _service(job, options), _job(job, options)]
    if options.kind == 'trainjob':
        return [*found, _training_runtime(job, options), _train_job(job, options)]
    return [*found, _job_set(job, options)]


def text(documents: list[Manifest]) -> str:
    """Returns manifests as YAML, the same text for the same manifests.

    Raises:
        ConfigError: PyYAML is missing.
    """
    try:
        import yaml
    except ImportError:
        raise missing() from None
    # Through JSON, so that no two places share an object, which would become an alias.
    return yaml.safe_dump_all(
        json.loads(json.dumps(documents)), sort_keys=False, width=math.inf, allow_unicode=True
    )


def missing() -> ConfigError:
    """What is said where the official client is not installed."""
    return ConfigError(
        "Kubernetes needs its Python client, which is not installed: pip install 'phalanx"
        "[kubernetes]'"
    )


def _check(job: Job, options: KubernetesOptions) -> None:
    if not options.image:
        raise ConfigError(
            'Which container image? Give --kube_image=IMAGE, one with Phalanx in it. '
            'docs/clusters/kubernetes.md tells how to build it.'
        )
    # A Service is named after the job, and such names begin with a letter (DNS-1035).
    if not re.match('[a-z]', job.name):
        raise ConfigError(
            f'--name={job.name} is no name for Kubernetes: it must begin with a letter, as in '
            f'--name=job-{job.name}.'
        )
    longest = f'{pod.host_names(job, options)}-{job.hosts - 1}{_RANDOM_SUFFIX}'
    if len(longest) > _LONGEST_LABEL:
        raise ConfigError(
            f'--name={job.name} is too long by {len(longest) - _LONGEST_LABEL} characters: its '
            f'pods would be called {longest}, and names may have {_LONGEST_LABEL}.'
        )
    for name in _OURS:
        if name in job.environment:
            raise ConfigError(f'--env={name}=...: Phalanx sets it itself. Leave it out.')
    if (size := len(job.config.encode())) > _MOST_CONFIG_BYTES:
        raise ConfigError(
            f'The configuration has {size:,} bytes, and a ConfigMap holds {_MOST_CONFIG_BYTES:,}. '
            'Put what is long in it into a Python module of the image.'
        )
    paths = [each.path for each in options.volumes]
    for path in (pod.CONFIG_DIRECTORY, *paths):
        if paths.count(path) + (path == pod.CONFIG_DIRECTORY) > 1:
            raise ConfigError(f'--kube_volume: two volumes would be mounted at {path}.')
    _check_model_dir(job, options)


def _check_model_dir(job: Job, options: KubernetesOptions) -> None:
    holding = [each for each in options.volumes if each.holds(job.model_dir)]
    # The innermost is the one that is written to.
    volume = max(holding, key=lambda each: len(each.path), default=None)
    if volume is None or not volume.lasts:
        have = ', '.join(f'{each.source}:{each.path}' for each in options.volumes) or 'none'
        why = 'on none of the volumes'
        if volume is not None:
            why = f'on {volume.path}, which ' + (
                'is read-only' if volume.read_only else 'ends with its pod'
            )
        raise ConfigError(
            f'--model_dir={job.model_dir} lies {why} ({have}), so it would be lost with the pods. '
            'Mount one that all of them share, such as --kube_volume=CLAIM:/models, and give a '
            'directory on it.'
        )


def _metadata(
    job: Job, options: KubernetesOptions, suffix: str = '', component: str = ''
) -> Manifest:
    found: Manifest = {'name': f'{job.name}{suffix}'}
    if options.namespace:
        found['namespace'] = options.namespace
    found['labels'] = {**dict(options.labels), **labels(job.name, component)}
    return found


def _main_metadata(job: Job, options: KubernetesOptions) -> Manifest:
    found = _metadata(job, options)
    if options.queue:
        found['labels']['kueue.x-k8s.io/queue-name'] = options.queue
    found['annotations'] = {
        **dict(options.annotations),
        WORKERS: str(job.workers),
        WORKERS_PER_HOST: str(job.workers_per_host),
    }
    return found


def _config_map(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        'apiVersion': 'v1',
        'kind': 'ConfigMap',
        'metadata': _metadata(job, options, '-config'),
        'immutable': True,
        'data': {pod.CONFIG_FILE: job.config},
    }


def _service(job: Job, options: KubernetesOptions) -> Manifest:
    """Gives the pods names. They are needed before any pod is ready: readiness is their meeting."""
    return {
        'apiVersion': 'v1',
        'kind': 'Service',
        'metadata': _metadata(job, options),
        'spec': {
            'clusterIP': 'None',
            'publishNotReadyAddresses': True,
            'selector': labels(job.name, 'worker'),
        },
    }


def _suspended(options: KubernetesOptions) -> Manifest:
    # Kueue starts it. Where there is no Kueue, nothing jumps a queue that someone wanted.
    return {'suspend': True} if options.queue else {}


def _job(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        'apiVersion': 'batch/v1',
        'kind': 'Job',
        'metadata': _main_metadata(job, options),
        'spec': {
            **_suspended(options),
            'ttlSecondsAfterFinished': _WEEK_SECONDS,
            **_indexed_job(job, options),
        },
    }


def _job_set(job: Job, options: KubernetesOptions) -> Manifest:
    # No failurePolicy, so the JobSet fails with its Job. A policy that restarts the set after
    # disruptions would take all pods down, and the Job replaces the one that was lost.
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': _main_metadata(job, options),
        'spec': {
            **_suspended(options),
            'ttlSecondsAfterFinished': _WEEK_SECONDS,
            'network': {
                'enableDNSHostnames': True,
                'subdomain': job.name,
                'publishNotReadyAddresses': True,
            },
            'replicatedJobs': [_replicated(job, options)],
        },
    }


def _training_runtime(job: Job, options: KubernetesOptions) -> Manifest:
    """A plain runtime of this job's own: a TrainJob itself cannot say how lost pods are treated.

    Without `torch`, `jax` or `mpi` in its mlPolicy, Kubeflow Trainer sets nothing but the number of
    nodes. The label tells it which Job has the trainer, in a container named `node`.
    """
    replicated = _replicated(job, options)
    replicated['template']['metadata']['labels']['trainer.kubeflow.org/trainjob-ancestor-step'] = (
        'trainer'
    )
    return {
        'apiVersion': 'trainer.kubeflow.org/v1alpha1',
        'kind': 'TrainingRuntime',
        'metadata': _metadata(job, options),
        'spec': {
            'mlPolicy': {'numNodes': job.hosts},
            'template': {'spec': {'replicatedJobs': [replicated]}},
        },
    }


def _train_job(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        'apiVersion': 'trainer.kubeflow.org/v1alpha1',
        'kind': 'TrainJob',
        'metadata': _main_metadata(job, options),
        'spec': {
            **_suspended(options),
            'runtimeRef': {
                'apiGroup': 'trainer.kubeflow.org',
                'kind': 'TrainingRuntime',
                'name': job.name,
            },
            'trainer': {'numNodes': job.hosts},
        },
    }


def _replicated(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        'name': pod.replicated_job(options),
        'replicas': 1,
        'template': {
            'metadata': {'labels': {**dict(options.labels), **labels(job.name)}},
            'spec': _indexed_job(job, options),
        },
    }


def _indexed_job(job: Job, options: KubernetesOptions) -> Manifest:
    spec: Manifest = {
        'completionMode': 'Indexed',
        'completions': job.hosts,
        'parallelism': job.hosts,
        # Each host has retries, and a delay before them, of its own. With one limit for the job,
        # those who end because a peer did would use it up together.
        'backoffLimitPerIndex': options.retries,
        'maxFailedIndexes': 0,
        # Never two pods of one rank.
        'podReplacementPolicy': 'Failed',
        'podFailurePolicy': {
            'rules': [
                # Evicted, preempted, or its node is gone: replaced, and not counted. First, as a
                # task that is cut short while it saves may end with any code.
                {
                    'action': 'Ignore',
                    'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}],
                },
                # The leader has given up, or a mistake in flags or configuration.
                {
                    'action': 'FailJob',
                    'onExitCodes': {
                        'containerName': pod.container_name(options),
                        'operator': 'In',
                        'values': [1, 2],
                    },
                },
                # All else counts: 75, and whatever killed the task itself.
            ]
        },
        # The leader ends with 0 once all hosts have ended. One that was lost at that moment, or
        # that an elastic job did without, need not come back.
        'successPolicy': {'rules': [{'succeededIndexes': '0'}]},
    }
    if job.time_limit_seconds is not None:
        spec['activeDeadlineSeconds'] = job.time_limit_seconds
    spec['template'] = pod.template(job, options)
    return spec


def _tensorboard(job: Job, options: KubernetesOptions) -> list[Manifest]:
    metadata, ours = _metadata(job, options, '-tensorboard', 'tensorboard'), 'tensorboard'
    deployment = {
        'apiVersion': 'apps/v1',
        'kind': 'Deployment',
        'metadata': metadata,
        'spec': {
            'replicas': 1,
            'selector': {'matchLabels': labels(job.name, ours)},
            'template': pod.tensorboard(job, options),
        },
    }
    port = {'name': 'http', 'port': pod.TENSORBOARD_PORT, 'targetPort': 'http'}
    service = {
        'apiVersion': 'v1',
        'kind': 'Service',
        'metadata': metadata,
        'spec': {'type': 'ClusterIP', 'selector': labels(job.name, ours), 'ports': [port]},
    }
    return [deployment, service]
