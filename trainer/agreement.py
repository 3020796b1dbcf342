"""What all workers must know alike before they do something together.

A decision that one worker takes alone (its clock, its signal, its disk) would leave the others
waiting in a collective for ever. Here every worker gives its view and all get the same answer.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.errors import ConfigError


class Agreement:
    """Sums numbers over the workers of a cluster; every worker must call it at the same point.

    Args:
        strategy: the strategy all workers run under.
        cluster: who the workers are; with one there is nothing to communicate.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster):
        self._strategy, self._cluster = strategy, cluster

    @tf.function(reduce_retracing=True)
    def _reduce(self, values: tf.Tensor) -> tf.Tensor:
        def replica(values):
            context = tf.distribute.get_replica_context()
            values = tf.identity(values)  # An argument has no device; the reduction asks for one.
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

        reduced = self._strategy.run(replica, args=(values,))
        return self._strategy.experimental_local_results(reduced)[0]

    def sum(self, values: Sequence[float]) -> np.ndarray:
        """Returns the elementwise sum over workers, float64 [len(values)], equal everywhere."""
        values = np.asarray(values, np.float64)
        if self._cluster.num_workers == 1:
            return values
        replicas_per_worker = self._strategy.num_replicas_in_sync // self._cluster.num_workers
        return self._reduce(tf.constant(values)).numpy() / replicas_per_worker

    def chief_does(self, action: Callable[[], float]) -> float:
        """Lets the chief act and gives its result to all; its refusal ends every worker.

        Raises:
            ConfigError: the chief's own on the chief, a pointer to it on the others.
        """
        result, refusal = 0.0, None
        if self._cluster.is_chief:
            try:
                result = action()
            except ConfigError as error:
                refusal = error
        result, refused = self.sum([result, refusal is not None])
        if refusal:
            raise refusal
        if refused:
            raise ConfigError('Worker 0 refused to start; its message tells why.')
        return result

    def check_same(self, what: str, digest: Callable[[], str], mend: str | None = None) -> None:
        """Raises RuntimeError unless `digest`, hex digits, is the same on all workers.

        With `mend`, which says how users can make it so, it raises ConfigError.
        """
        if self._cluster.num_workers == 1:
            return
        sha256 = digest()
        number = float(int(sha256[:8], 16))  # exact in float64, and so is the sum
        if self.sum([number])[0] != number * self._cluster.num_workers:
            if mend:
                raise ConfigError(f'{what} of this worker is not that of the others. {mend}')
            raise RuntimeError(f'{what} of this worker is not that of the others: {sha256}')

    def wait(self) -> None:
        """Returns when every worker has come here."""
        self.sum([0.0])
