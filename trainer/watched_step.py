"""The step of training as plain Python, with a look at all that passes through it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

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
        args, accumulate, options: as for `TrainStep`.

    Attributes:
        gradients: of each variable that has one, those that are not finite first, then the largest.
        loss_and_norm: of the global batch, finite or not.
    """

    def __init__(self, watch: Watch, *args, accumulate: int, **options):
        super().__init__(*args, accumulate=accumulate, **options)
        self._watch, self._parts = watch, accumulate
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

    def _micro_batch(self, trainable, moving, batch, step, replica, scale, micro_batch=None):
        if tf.executing_eagerly():
            self._watch.part(0 if micro_batch is None else int(micro_batch), self._parts)
            self._watch.batch(batch)
        return super()._micro_batch(
            trainable, moving, batch, step, replica, scale, micro_batch=micro_batch
        )

    @contextlib.contextmanager
    def watched_loss(self) -> Iterator[None]:
        """Looks at the loss of every example within the block."""
        loss = self._loss
        if isinstance(loss, keras.losses.Loss):
            # What is called of it, and it must stay a Keras loss to be called that way.
            loss.call = self._watch.loss(loss.call)
        else:
            self._loss = self._watch.loss(loss)
        try:
            yield
        finally:
            if self._loss is loss:
                del loss.call
            self._loss = loss


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
