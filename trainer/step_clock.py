"""How long the replicas are idle for lack of a batch, and how long they then work on it."""

import time
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Looking at the clock takes longer than a small step, so only some steps do. A prime, not to beat
# in time with the input's own cycles.
EVERY = 61


class StepClock:
    """Measures some of the steps of a loop, the last always, and estimates the rest from them.

    It reads the time by way of Python: TensorFlow's own clock refuses to run when op determinism
    is on. Nothing waits for it: the next batch may well be there before the last step is done.
    """

    def __init__(self):
        self._waited = self._worked = 0.0
        self._idle_since = self._there_since = 0.0

    def is_due(self, steps_left: tf.Tensor) -> tf.Tensor:
        """Returns whether to measure the step; `steps_left`, int64 scalar, counts it in."""
        return tf.equal(steps_left % EVERY, 1)

    def measure_wait(self, there: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
        """Adds the time from when `after` is computed to when `there` is; 0 if that is sooner.

        Call it where the step is due.

        Returns:
            bool scalar, true, once that is done.
        """
        tf.numpy_function(self._idle, [after], [])
        return tf.ensure_shape(tf.numpy_function(self._there, [there], tf.bool), [])

    def measure_work(self, due: tf.Tensor, done: Sequence[tf.Tensor]) -> None:
        """Adds the time from when the batch was there to when all of `done` are computed.

        Call it in every replica; the last of those that share the clock counts.

        Args:
            due: bool scalar: false, or what `measure_wait` has returned.
            done: gradients, at least one.
        """
        # One number stands for all: a condition that took them all in would cost a copy of each.
        # It is of the device that computes them, so that its way to Python waits for them there.
        with tf.control_dependencies(done):
            first = done[0].values if isinstance(done[0], tf.IndexedSlices) else done[0]
            last = tf.reshape(first, [-1])[:1]
        tf.cond(due, lambda: tf.numpy_function(self._work, [last], []), tf.no_op)

    def take(self, num_steps: int) -> tuple[float, float]:
        """Returns the seconds that `num_steps` steps waited and worked in all, and starts anew."""
        measured = -(-num_steps // EVERY)
        taken = self._waited * num_steps / measured, self._worked * num_steps / measured
        self._waited = self._worked = 0.0
        return taken

    def _idle(self, _):
        self._idle_since = time.perf_counter()

    def _there(self, _):
        self._there_since = time.perf_counter()
        self._waited += self._there_since - self._idle_since
        return np.True_

    def _work(self, _):
        # From the replica before, if there was one, which has moved the mark.
        now = time.perf_counter()
        self._worked += now - self._there_since
        self._there_since = now
