"""A rehearsal of everything a run will do, on one step, in a folder that is deleted again."""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from trainer import gin_setup
from trainer.agreement import Agreement
from trainer.checkpoint import Checkpoints
from trainer.cluster import Cluster
from trainer.interval import epoch_steps, parse_steps
from trainer.model_dir import ModelDir
from trainer.preflight import check_batch_size


def dry_run(
    strategy: tf.distribute.Strategy,
    cluster: Cluster,
    model_dir: str,
    workers: int | None = None,
) -> None:
    """Trains one step, evaluates one batch, saves, restores, exports, and prints the plan.

    Nothing is switched off: it is the program's own `train` and `export`, held to one step.

    Args:
        strategy: where the run will train.
        cluster: which worker this is.
        model_dir: of the run; what is in it stays as it is.
        workers: rehearse the part of one replica of a job of so many workers; `strategy` is then
            of one device. None rehearses the whole step.

    Raises:
        ConfigError: whatever would end the run itself.
        RuntimeError: the restored state is not the one that was saved.
    """
    agreement = Agreement(strategy, cluster)
    share = _Share(workers) if workers else None
    with _scratch(ModelDir(model_dir), cluster, agreement) as scratch:
        common = {
            'strategy': strategy,
            'cluster': cluster,
            'model_dir': str(scratch),
            # Once: after the first part there is more in it, and nothing has changed.
            'config': functools.cache(gin_setup.record),
            **(share.arguments if share else {}),
        }
        first = gin_setup.train(**common, max_steps=1)
        again = gin_setup.train(**common, max_steps=0)
        if again.state_sha256 != first.state_sha256:
            raise RuntimeError('The restored state is not the one that was saved.')
        if cluster.is_chief:
            gin_setup.export(model_dir=str(scratch))
            print(_plan(scratch, first.step, share))
        agreement.wait()


class _Share:
    """What one replica does in a job of many, as far as the configuration says."""

    def __init__(self, workers: int):
        gpus = tf.config.list_physical_devices('GPU')
        self.workers, self.device_type = workers, 'GPU' if gpus else 'CPU'
        devices = gin_setup.parameter('strategy.devices_per_worker')
        # `phalanx run` shares out the GPUs of this host.
        self.devices = devices or len(gpus) // workers or 1
        self.replicas = workers * self.devices
        self.batch_size = gin_setup.parameter('train.batch_size')
        check_batch_size(
            self.batch_size, self.replicas, gin_setup.parameter('train.accumulate') or 1
        )
        data = gin_setup.parameter('train.train_data')
        steps_per_epoch = epoch_steps(data.source.num_examples, self.batch_size)
        shards = gin_setup.parameter('train.canonical_shards')
        self.arguments = {
            'batch_size': self.batch_size // self.replicas,
            'steps': parse_steps(gin_setup.parameter('train.steps'), steps_per_epoch),
            'train_data': data,  # Not to be read twice.
            'canonical_shards': shards and shards // self.replicas,
        }


@contextlib.contextmanager
def _scratch(dirs: ModelDir, cluster: Cluster, agreement: Agreement) -> Iterator[Path]:
    """A folder in model_dir, so that its file system is what is tried; then it is gone."""
    scratch, was_there = dirs.path / 'dry-run', dirs.path.exists()

    def prepare() -> int:
        shutil.rmtree(scratch, ignore_errors=True)
        ModelDir(scratch).create()
        return 0

    agreement.chief_does(prepare)
    try:
        yield scratch
    finally:
        if cluster.is_chief:
            shutil.rmtree(scratch, ignore_errors=True)
            if not was_there:
                shutil.rmtree(dirs.path, ignore_errors=True)


def _plan(scratch: Path, step: int, share: _Share | None) -> str:
    checkpoints = Checkpoints(ModelDir(scratch).checkpoints, writer=False)
    _, manifest = checkpoints.read(step)
    size = sum(file.stat().st_size for file in checkpoints.path(step).iterdir())
    topology, batch = manifest['topology'], manifest['global_batch_size']
    workers, each = topology['num_workers'], topology['replicas_per_worker']
    kind, device_type = topology['kind'], topology['device_type']
    per_replica = batch // topology['replicas']
    examples = manifest['num_examples']
    rehearsed = 'training, evaluation, save, restore, export'
    if share:
        kind = 'multi_worker' if share.workers > 1 else 'mirrored'
        workers, each, device_type = share.workers, share.devices, share.device_type
        per_replica, batch = batch, share.batch_size
        rehearsed += ', by one replica'
    lines = {
        'topology': f'{kind}: {workers} worker(s) of {each} {device_type}',
        'batch': f'{batch} examples a step, {per_replica} on each replica',
        'data': f'{examples:,} examples' if examples else 'a stream of unknown length',
        'epoch': f'{examples / batch:,.1f} steps' if examples else 'unknown',
        'run': f'{manifest["last_step"]:,} steps',
        'parameters': f'{manifest["num_parameters"]:,}',
        'checkpoint': f'{size:,} bytes',
        'rehearsed': rehearsed,
    }
    return '\n'.join(f'{name + ":":<12} {value}' for name, value in lines.items())
