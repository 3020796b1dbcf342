"""How long the replicas are idle for lack of a batch."""

import time

import tensorflow as tf

# Looking at the clock takes longer than a small step, so only some steps do. A prime, not to beat
# in time with the input's own cycles.
EVERY = 61


class InputClock:
    """Measures some of the steps of a loop, the last always, and estimates the rest from them.

    It reads the time by way of Python: TensorFlow's own clock refuses to run when op determinism
    is on. Nothing waits for it: the next batch may well be there before the last step is done.
    """

    def __init__(self):
        self._seconds = 0.0
        self._idle_since = 0.0

    def is_due(self, steps_left: tf.Tensor) -> tf.Tensor:
        """Returns whether to measure the step; `steps_left`, int64 scalar, counts it in."""
        return tf.equal(steps_left % EVERY, 1)

    def measure(self, there: tf.Tensor, after: tf.Tensor) -> None:
        """Adds the time from when `after` is computed to when `there` is; 0 if that is sooner."""
        tf.numpy_function(self._begin, [after], [])
        tf.numpy_function(self._end, [there], [])

    def take(self, num_steps: int) -> float:
        """Returns the seconds that `num_steps` steps waited in all, and starts anew."""
        measured = -(-num_steps // EVERY)
        seconds, self._seconds = self._seconds, 0.0
        return seconds * num_steps / measured

    def _begin(self, _):
        self._idle_since = time.perf_counter()

    def _end(self, _):
        self._seconds += time.perf_counter() - self._idle_since
