"""The step of training as plain Python, with a look at all that passes through it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from trainer.gradients import Gradients
from trainer.numerics import Watch
from trainer.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The reduced gradient of one variable.

    Attributes:
        path: of the variable.
        norm: before clipping; not finite if the gradient is not.
        bad: how many of its numbers are not finite.
    """

    path: str
    norm: float
    bad: int


class WatchedStep(TrainStep):
    """The step of training, which shows what passes through it while it runs eagerly.

    Args:
        watch: what looks on.
        strategy, args, accumulate, canonical_shards, options: as for `TrainStep`.

    Attributes:
        gradients: of each variable that has one, those that are not finite first, then the largest.
        loss_and_norm: of the global batch, finite or not.
    """

    def __init__(
        self, watch: Watch, strategy, *args, accumulate: int, canonical_shards=None, **options
    ):
        self._watch, self._parts = watch, accumulate
        if canonical_shards:
            self._parts *= canonical_shards // strategy.num_replicas_in_sync
        options.update(accumulate=accumulate, canonical_shards=canonical_shards)
        super().__init__(strategy, *args, **options)
        self.gradients: list[Gradient] = []
        self.loss_and_norm = (0.0, 0.0)

    def _loop(self, iterator, num_steps):
        if not tf.config.functions_run_eagerly():
            return super()._loop(iterator, num_steps)
        # AutoGraph would run copies of all code below, which neither a debugger nor a reader of
        # a stack knows. Plain Python needs none.
        plain = tf.autograph.experimental.do_not_convert(TrainStep._loop.python_function)
        return plain(self, iterator, num_steps)

    def _reduced(self, batch, step, due):
        if not tf.executing_eagerly():
            return super()._reduced(batch, step, due)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        self._watch.replica(int(replica), batch['ids'].numpy())
        grads, moving, out = super()._reduced(batch, step, due)
        # Equal on all replicas, so it does not matter which one is last.
        pairs = zip(self._state.model.trainable_variables, grads, strict=True)
        found = [_gradient(v.path, g.numpy()) for v, g in pairs if g is not None]
        self.gradients = sorted(found, key=lambda each: (not each.bad, -each.norm))
        _, *loss_and_norm = out['sums'].numpy()[:3].tolist()
        self.loss_and_norm = tuple(loss_and_norm)
        return grads, moving, out

    def _differentiate(self, *args, **options):
        return _WatchedGradients(self._watch, self._parts, *args, **options)

    @contextlib.contextmanager
    def watched_loss(self) -> Iterator[None]:
        """Looks at the loss of every example within the block."""
        with self._objective.watched(self._watch.loss):
            yield


class _WatchedGradients(Gradients):
    def __init__(self, watch: Watch, parts: int, *args, **options):
        super().__init__(*args, **options)
        self._watch, self._count = watch, parts

    def _micro_batch(self, trainable, moving, batch, step, share, scale, micro_batch=None):
        if tf.executing_eagerly():
            self._watch.next_part(self._count)
            self._watch.batch(batch)
        return super()._micro_batch(trainable, moving, batch, step, share, scale, micro_batch)


def _gradient(path: str, array: np.ndarray) -> Gradient:
    array = array.astype(np.float64)
    bad = array.size - int(np.isfinite(array).sum())
    return Gradient(path, float(np.linalg.norm(array.reshape(-1))), bad)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Lets compiled functions run as plain Python within the block, without a warning."""
    logger, before = tf.get_logger(), tf.config.functions_run_eagerly()
    level = logger.level
    tf.config.run_functions_eagerly(True)
    logger.setLevel('ERROR')  # It says that eager steps are slow.
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
        logger.setLevel(level)
