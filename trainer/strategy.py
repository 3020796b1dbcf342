"""From a cluster and the local devices to a `tf.distribute` strategy."""

import os
from typing import Any

import tensorflow as tf

# The public API cannot give a worker more than one CPU replica, nor tell these two settings.
from tensorflow.python.distribute.collective_all_reduce_strategy import (
    CollectiveAllReduceExtended,
)
from tensorflow.python.framework.config import is_op_determinism_enabled
from tensorflow.python.util._pywrap_util_port import IsMklEnabled

from trainer.cluster import Cluster
from trainer.errors import ConfigError, nearest

_KINDS = ('auto', 'one_device', 'mirrored', 'multi_worker')
_COLLECTIVES = ('auto', 'ring', 'nccl')


def build_strategy(
    *,
    cluster: Cluster,
    kind: str = 'auto',
    devices_per_worker: int | None = None,
    collective: str = 'auto',
    bytes_per_pack: int = 0,
    collective_timeout_seconds: float | None = None,
    deterministic: bool = True,
) -> tf.distribute.Strategy:
    """Builds the strategy that this worker trains under.

    Call it before any other TensorFlow operation, and in a job of several workers after
    `trainer.cluster.meet`.

    Args:
        cluster: the workers of the job. An evaluator always gets a local strategy.
        kind: 'multi_worker', 'mirrored' (several devices of one process), 'one_device', or 'auto':
            the first of these that the cluster and the number of devices call for.
        devices_per_worker: the number of GPUs to use or, where there is no GPU, of CPU devices
            to make, each a replica. None: all GPUs, or one CPU.
        collective: 'nccl' (GPUs), 'ring' (gRPC between workers, copies within one) or 'auto'.
        bytes_per_pack: multi_worker only; size of the packs in which gradients are reduced. 0
            leaves it to TensorFlow.
        collective_timeout_seconds: multi_worker only; a reduction that takes longer raises
            `tf.errors.DeadlineExceededError`. None waits for ever.
        deterministic: whether equal runs must give equal bits, which costs some speed on GPUs.
            Stays on for the rest of the process.

    Returns:
        A `tf.distribute.OneDeviceStrategy`, `MirroredStrategy` or `MultiWorkerMirroredStrategy`.

    Raises:
        ConfigError: a value is wrong, the machine lacks the devices, or TensorFlow has already
            run operations.
    """
    for name, value, names in (('kind', kind, _KINDS), ('collective', collective, _COLLECTIVES)):
        if value not in names:
            raise ConfigError(
                f'strategy.{name} is {value!r}, but must be one of {", ".join(names)}.'
                f'{nearest(str(value), names)}'
            )
    if devices_per_worker is not None:
        _check_number('devices_per_worker', devices_per_worker, int, least=1)
    _check_number('bytes_per_pack', bytes_per_pack, int, least=0)
    if collective_timeout_seconds is not None:
        _check_number('collective_timeout_seconds', collective_timeout_seconds, float, least=1)
    if cluster.type == 'evaluator' and kind == 'multi_worker':
        kind = 'auto'
    if kind not in ('auto', 'multi_worker') and cluster.num_workers > 1:
        raise ConfigError(
            f'strategy.kind is {kind!r}, but the job has {cluster.num_workers} workers, and each '
            "would train by itself. Use 'auto' or 'multi_worker', or start one worker."
        )
    if kind == 'one_device' and (devices_per_worker or 1) > 1:
        raise ConfigError(
            f"strategy.kind is 'one_device', but devices_per_worker is {devices_per_worker}. Use "
            "'mirrored' or 'auto' for several devices."
        )

    wanted = 1 if kind == 'one_device' else devices_per_worker
    device_type, count = _prepare_devices(wanted)
    if collective == 'nccl' and device_type == 'CPU':
        raise ConfigError(
            "strategy.collective is 'nccl', which needs GPUs, and TensorFlow finds none here. "
            "Use 'auto' or 'ring'."
        )
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    if kind == 'auto':
        kind = 'multi_worker' if cluster.num_workers > 1 else 'mirrored'
        if cluster.num_workers == count == 1:
            kind = 'one_device'

    if kind == 'one_device':
        return tf.distribute.OneDeviceStrategy(f'/device:{device_type}:0')
    if kind == 'mirrored':
        no_nccl = collective == 'ring' and device_type == 'GPU'
        # Two strategies of one process would take each other's collectives for their own.
        tf.distribute.MirroredStrategy._collective_key_base += 1_000_000
        return tf.distribute.MirroredStrategy(
            [f'/device:{device_type}:{i}' for i in range(count)],
            cross_device_ops=tf.distribute.HierarchicalCopyAllReduce() if no_nccl else None,
        )
    options = tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=bytes_per_pack,
        timeout_seconds=collective_timeout_seconds,
        implementation=tf.distribute.experimental.CommunicationImplementation(collective.upper()),
    )
    try:
        return _MultiWorker(cluster, options, device_type, count)
    except RuntimeError as error:
        if 'program startup' not in str(error):
            raise
        raise ConfigError(
            'A multi-worker strategy must come before any TensorFlow operation, but one has run '
            'in this process. Look for tensors made while a module is imported.'
        ) from error


def _check_number(name: str, value: Any, kind: type, *, least: int) -> None:
    accepted = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, accepted) or value < least:
        what = 'an integer' if kind is int else 'a number'
        raise ConfigError(f'strategy.{name} is {value!r}, but must be {what} of {least} or more.')


def _prepare_devices(wanted: int | None) -> tuple[str, int]:
    """Makes the devices ready and returns their type, 'GPU' or 'CPU', and how many to use."""
    gpus = tf.config.get_visible_devices('GPU')
    if gpus:
        if wanted and wanted > len(gpus):
            raise ConfigError(
                f'strategy.devices_per_worker is {wanted}, but TensorFlow finds {len(gpus)} '
                f'GPU(s) here. Use at most {len(gpus)}, or None for all; hide them with '
                "CUDA_VISIBLE_DEVICES='' to train on the CPU."
            )
        gpus = gpus[:wanted]
        try:
            tf.config.set_visible_devices(gpus, 'GPU')
            for gpu in gpus:
                tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            pass  # TensorFlow runs already; whoever started it chose how GPU memory is taken.
        return 'GPU', len(gpus)

    count = wanted or 1
    if count > 1:
        cpu = tf.config.list_physical_devices('CPU')[0]
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError:
            there = len(tf.config.list_logical_devices('CPU'))
            if there < count:
                raise ConfigError(
                    f'strategy.devices_per_worker is {count}, but TensorFlow runs already in this '
                    f'process, with {there} CPU device(s). Build the strategy before any '
                    'TensorFlow operation.'
                ) from None
    return 'CPU', count


class _Extended(CollectiveAllReduceExtended):
    """Takes the devices it is told; TensorFlow's takes all GPUs or else the one CPU."""

    def __init__(self, container, resolver, options, device_type, count):
        self._device_type, self._count = device_type, count
        super().__init__(container, cluster_resolver=resolver, communication_options=options)

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        name = f'{worker_device}/device:{self._device_type}'
        return tuple(f'{name}:{i}' for i in range(self._count)), self._device_type


class _MultiWorker(tf.distribute.MultiWorkerMirroredStrategy):
    """`MultiWorkerMirroredStrategy` over `count` devices of each worker of a cluster."""

    def __init__(self, cluster, options, device_type, count):
        spec = tf.train.ClusterSpec({'worker': list(cluster.workers)} if cluster.workers else {})
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            spec, task_type='worker', task_id=cluster.index
        )
        # Past the parent's constructor, which would put TensorFlow's own in the place of ours.
        tf.distribute.Strategy.__init__(
            self, _Extended(self, resolver, options, device_type, count)
        )


def topology(strategy: tf.distribute.Strategy, cluster: Cluster) -> dict[str, Any]:
    """Returns what decides, beside the configuration, which bits a run ends with.

    Args:
        strategy: the strategy the run trains under.
        cluster: the workers of the job.

    Returns:
        A dict that JSON can hold: 'kind', 'num_workers', 'replicas', 'replicas_per_worker',
        'device_type', 'onednn' (whether its kernels are used on the CPU), 'deterministic' and
        'intra_op_threads'.
    """
    kinds = {
        tf.distribute.OneDeviceStrategy: 'one_device',
        tf.distribute.MirroredStrategy: 'mirrored',
        tf.distribute.MultiWorkerMirroredStrategy: 'multi_worker',
    }
    kind = next((name for cls, name in kinds.items() if isinstance(strategy, cls)), 'custom')
    device = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0])
    return {
        'kind': kind,
        'num_workers': cluster.num_workers,
        'replicas': strategy.num_replicas_in_sync,
        'replicas_per_worker': strategy.num_replicas_in_sync // cluster.num_workers,
        'device_type': device.device_type,
        'onednn': IsMklEnabled(),
        'deterministic': is_op_determinism_enabled(),
        'intra_op_threads': _intra_op_threads(),
    }


def _intra_op_threads() -> int:
    # TensorFlow's order: its configuration, this variable, the processors it may run on.
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    chosen = chosen or int(os.environ.get('TF_NUM_INTRAOP_THREADS', 0))
    if chosen:
        return chosen
    affinity = getattr(os, 'sched_getaffinity', None)
    return len(affinity(0)) if affinity else os.cpu_count()
