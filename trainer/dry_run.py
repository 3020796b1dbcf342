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
from trainer.model_dir import ModelDir


def dry_run(strategy: tf.distribute.Strategy, cluster: Cluster, model_dir: str) -> None:
    """Trains one step, evaluates one batch, saves, restores, exports, and prints the plan.

    Nothing is switched off: it is the program's own `train` and `export`, held to one step.

    Args:
        strategy: where the run will train.
        cluster: which worker this is.
        model_dir: of the run; what is in it stays as it is.

    Raises:
        ConfigError: whatever would end the run itself.
        RuntimeError: the restored state is not the one that was saved.
    """
    agreement = Agreement(strategy, cluster)
    with _scratch(ModelDir(model_dir), cluster, agreement) as scratch:
        common = {
            'strategy': strategy,
            'cluster': cluster,
            'model_dir': str(scratch),
            # Once: after the first part there is more in it, and nothing has changed.
            'config': functools.cache(gin_setup.record),
        }
        first = gin_setup.train(**common, max_steps=1)
        again = gin_setup.train(**common, max_steps=0)
        if again.state_sha256 != first.state_sha256:
            raise RuntimeError('The restored state is not the one that was saved.')
        if cluster.is_chief:
            gin_setup.export(model_dir=str(scratch))
            print(_plan(scratch, first.step))
        agreement.wait()


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


def _plan(scratch: Path, step: int) -> str:
    checkpoints = Checkpoints(ModelDir(scratch).checkpoints, writer=False)
    _, manifest = checkpoints.read(step)
    size = sum(file.stat().st_size for file in checkpoints.path(step).iterdir())
    topology, batch = manifest['topology'], manifest['global_batch_size']
    workers, each = topology['num_workers'], topology['replicas_per_worker']
    per_replica = batch // topology['replicas']
    lines = {
        'topology': f'{topology["kind"]}: {workers} worker(s) of {each} {topology["device_type"]}',
        'batch': f'{batch} examples a step, {per_replica} on each replica',
        'data': f'{manifest["num_examples"]:,} examples',
        'epoch': f'{manifest["num_examples"] / batch:,.1f} steps',
        'run': f'{manifest["last_step"]:,} steps',
        'parameters': f'{manifest["num_parameters"]:,}',
        'checkpoint': f'{size:,} bytes',
        'rehearsed': 'training, evaluation, save, restore, export',
    }
    return '\n'.join(f'{name + ":":<12} {value}' for name, value in lines.items())
