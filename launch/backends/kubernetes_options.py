"""The flags of the Kubernetes back end, and what they mean."""

import dataclasses
import posixpath
import re

from absl import flags

from trainer.errors import ConfigError, nearest

KINDS = ('jobset', 'job', 'trainjob', 'auto')
_EFFECTS = ('NoSchedule', 'PreferNoSchedule', 'NoExecute')
_EXAMPLE = '--kube_volume=CLAIM:/models'


@dataclasses.dataclass(frozen=True)
class Volume:
    """Storage that every pod mounts.

    Attributes:
        source: the name of a PersistentVolumeClaim, 'nfs://SERVER/EXPORT', or 'empty' for a
            directory that ends with its pod.
        path: where the pods see it, an absolute path.
        read_only: whether they may only read it.
    """

    source: str
    path: str
    read_only: bool = False

    @property
    def lasts(self) -> bool:
        """Whether what is written there is there after the pod, and for other pods."""
        return self.source != 'empty' and not self.read_only

    def holds(self, path: str) -> bool:
        """Whether a path lies on it."""
        return posixpath.normpath(path).startswith(f'{self.path}/') or path == self.path


@dataclasses.dataclass(frozen=True)
class KubernetesOptions:
    """What a user may tell of the cluster and of what the pods need there.

    Attributes:
        image: the container image; it has Phalanx in it.
        kind: the object that is made, one of `KINDS`; 'auto' takes a JobSet where the cluster knows
            them and else a Job.
        context: of the kubeconfig; None for its current one, or for that of the pod that asks.
        namespace: None for that of the context.
        queue: the LocalQueue of Kueue that admits the job, None without Kueue.
        volumes: at least that of model_dir.
        secrets: names of Secrets whose keys become variables of the environment.
        pull_secrets: names of Secrets for the registry of the image.
        service_account: of the pods, None for the namespace's default, without its token.
        gpu_resource: what the cluster calls a GPU.
        node_selector: labels that nodes must have.
        tolerations: as (key, value or None, effect or None) of taints that the pods bear.
        labels: more labels for all objects.
        annotations: more annotations for job and pods.
        shm_mb: the size of /dev/shm in MiB; None is that of the container runtime, or with GPUs as
            much as the pod has memory.
        retries: how often a pod of each host may end badly and be started again; evictions and
            lost nodes do not count.
        tensorboard: whether a pod with TensorBoard runs beside the job.
    """

    image: str = ''
    kind: str = 'jobset'
    context: str | None = None
    namespace: str | None = None
    queue: str | None = None
    volumes: tuple[Volume, ...] = ()
    secrets: tuple[str, ...] = ()
    pull_secrets: tuple[str, ...] = ()
    service_account: str | None = None
    gpu_resource: str = 'nvidia.com/gpu'
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[tuple[str, str | None, str | None], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    shm_mb: int | None = None
    retries: int = 10
    tensorboard: bool = False


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this back end."""
    new = {'flag_values': values}
    default = KubernetesOptions()

    def text(name: str, told: str) -> None:
        flags.DEFINE_string(f'kube_{name}', getattr(default, name), told, **new)

    def several(name: str, told: str) -> None:
        flags.DEFINE_multi_string(f'kube_{name}', [], told, **new)

    text('image', 'The container image, with Phalanx in it, such as registry.example/phalanx:1.')
    text(
        'kind',
        'What is made: jobset; job, for clusters without JobSet; trainjob, for Kubeflow Trainer; '
        'auto, a JobSet where the cluster knows them and else a Job.',
    )
    text('context', 'Of the kubeconfig. Default: its current one.')
    text('namespace', 'Where all of it lives. Default: that of the context.')
    text('queue', 'The LocalQueue of Kueue that admits the job.')
    several(
        'volume',
        'CLAIM:/PATH mounts a PersistentVolumeClaim, nfs://SERVER/EXPORT:/PATH a file server, '
        'empty:/PATH a directory that ends with its pod; :ro at the end for reading only. '
        'model_dir must lie on one that lasts.',
    )
    several('secret', 'A Secret whose keys become variables of the environment.')
    several('pull_secret', 'A Secret for the registry of the image.')
    text('service_account', "Of the pods. Default: the namespace's, without its token.")
    text('gpu_resource', 'What the cluster calls a GPU.')
    several('node_selector', 'LABEL=VALUE that nodes must have.')
    several('toleration', 'KEY[=VALUE][:EFFECT] of a taint that the pods bear.')
    several('label', 'KEY=VALUE, a label for everything that is made.')
    several('annotation', 'KEY=VALUE, an annotation for the job and its pods.')
    flags.DEFINE_integer('kube_shm_mb', None, 'The size of /dev/shm, in MiB.', 1, **new)
    flags.DEFINE_integer(
        'kube_retries',
        default.retries,
        'How often a pod of each host may end badly and be started again.',
        0,
        **new,
    )
    flags.DEFINE_boolean('kube_tensorboard', False, 'A pod with TensorBoard beside it.', **new)


def from_flags(values: flags.FlagValues) -> KubernetesOptions:
    """Returns what the flags of `define_flags` say.

    Raises:
        ConfigError: one of them cannot be read.
    """
    if values.kube_kind not in KINDS:
        raise ConfigError(
            f'--kube_kind={values.kube_kind} is none of {", ".join(KINDS)}.'
            f'{nearest(values.kube_kind, KINDS)}'
        )
    return KubernetesOptions(
        image=values.kube_image,
        kind=values.kube_kind,
        context=values.kube_context,
        namespace=values.kube_namespace,
        queue=values.kube_queue,
        volumes=tuple(map(volume, values.kube_volume)),
        secrets=tuple(values.kube_secret),
        pull_secrets=tuple(values.kube_pull_secret),
        service_account=values.kube_service_account,
        gpu_resource=values.kube_gpu_resource,
        node_selector=_pairs('node_selector', values.kube_node_selector),
        tolerations=tuple(map(_toleration, values.kube_toleration)),
        labels=_pairs('label', values.kube_label),
        annotations=_pairs('annotation', values.kube_annotation),
        shm_mb=values.kube_shm_mb,
        retries=values.kube_retries,
        tensorboard=values.kube_tensorboard,
    )


def volume(text: str) -> Volume:
    """Reads the value of one --kube_volume.

    Raises:
        ConfigError: it is none.
    """
    bare = text.removesuffix(':ro')
    # The last ':/' parts them: an NFS source has another one.
    source, _, path = bare.rpartition(':/')
    if not source or not path.strip('/') or source.startswith('/'):
        raise ConfigError(
            f'--kube_volume={text} is no volume: it is SOURCE:/PATH, such as {_EXAMPLE}, '
            'nfs://SERVER/EXPORT:/models or empty:/scratch. Paths of the node are not mounted.'
        )
    path = posixpath.normpath(f'/{path}')
    if ':' in path:
        raise ConfigError(f'--kube_volume={text}: the path {path} may not have a colon in it.')
    if source.startswith('nfs://'):
        server, _, export = source.removeprefix('nfs://').partition('/')
        if not server or not export:
            raise ConfigError(
                f'--kube_volume={text} is no file server: it is nfs://SERVER/EXPORT:/PATH.'
            )
    elif not re.fullmatch(r'[a-z0-9]([-a-z0-9.]*[a-z0-9])?', source):
        raise ConfigError(
            f'--kube_volume={text}: {source!r} is no name of a PersistentVolumeClaim, which has '
            'lower-case letters, digits and dashes. `kubectl get pvc` lists those there are.'
        )
    return Volume(source, path, read_only=bare != text)


def _pairs(flag: str, texts: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for each in texts:
        key, equals, value = each.partition('=')
        if not key or not equals:
            raise ConfigError(f'--kube_{flag}={each} is not of the form KEY=VALUE.')
        pairs.append((key, value))
    return tuple(pairs)


def _toleration(text: str) -> tuple[str, str | None, str | None]:
    taint, colon, effect = text.rpartition(':')
    if not colon:
        taint, effect = text, ''
    key, equals, value = taint.partition('=')
    if not key or (colon and effect not in _EFFECTS):
        raise ConfigError(
            f'--kube_toleration={text} is not of the form KEY[=VALUE][:EFFECT], with one of '
            f'{", ".join(_EFFECTS)} for an effect.{nearest(effect, _EFFECTS)}'
        )
    return key, value if equals else None, effect or None
