"""The interface between stored examples and the pipeline: random access by record number."""

import abc
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.data import order
from trainer.errors import ConfigError

Features = dict[str, tf.Tensor]


class Source(abc.ABC):
    """A fixed set of numbered examples, each a dict of named features, read in any order.

    The order of training is computed and not read (see `order`), so random access is all that
    a source has to offer. Whatever implements the four abstract members can be trained on:

    * Records are numbered 0 to `num_examples - 1`, the same on every worker and in every run.
    * Record i always holds the same bits; sources neither shuffle, augment nor repeat.
    * `fetch` is called while a graph is traced, and its graph runs on the host, in several
      threads at once and far more often than it is traced.
    * A damaged record makes the whole `fetch` fail, by `BadRecord` where Python reads, or by the
      error of the operation that cannot decode it. Its neighbours, fetched without it, do not.
      Files out of reach are another matter, and raise OSError.

    Attributes:
        in_order_only: whether it is a `Stream`, which has no random access.
        class_names: of the labels 0, 1, 2..., () if they have none.
    """

    in_order_only = False
    class_names: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def num_examples(self) -> int:
        """The number of examples, at least 1."""

    @property
    @abc.abstractmethod
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        """The shape and dtype of each feature of one example, without a batch dimension."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the contents, by which a resumed run notices other data.

        It is the same on every machine, and asked for at each start. A source that cannot afford
        to read everything takes what it can, such as sizes and samples, and says so.
        """

    @abc.abstractmethod
    def fetch(self, indices: tf.Tensor) -> Features:
        """Reads examples with graph operations.

        Args:
            indices: int64 [B], record numbers in [0, num_examples), in any order, repeats allowed.

        Returns:
            For each feature of `element_spec` a tensor [B, ...], row j from record indices[j].
        """

    def records(self, positions: tf.Tensor, *, seed: int) -> tf.Tensor:
        """Returns which record each position of training reads; here every epoch a permutation.

        Args:
            positions: int64 [B], see `order`.
            seed: of the run.

        Returns:
            int64 [B], in [0, num_examples). It depends on nothing but the arguments.
        """
        return order.records(positions, num_examples=self.num_examples, seed=seed)

    @property
    def has_own_order(self) -> bool:
        """Whether `records` is another one than here, as that of a mixture."""
        return type(self).records is not Source.records

    @property
    def files(self) -> tuple[str, ...]:
        """The files it reads, if any: beside them is kept what is learnt from the examples."""
        return ()

    def where(self, index: int) -> str:
        """Returns where a record lies, for messages: the file and what finds it therein."""
        return f'record {index}'

    def stored(self, indices: np.ndarray) -> dict[str, Sequence[bytes]]:
        """Returns, of features that are images, the encoded images that `fetch` decodes.

        `phalanx prepare` keeps them as they are where they decode to the same pixels.

        Args:
            indices: int64 [B], B at least 1, of records that can be read.
        """
        del indices
        return {}

    def bounds(self, feature: str) -> tuple[float, float] | None:
        """Returns the least and greatest value of a feature, or None if they are not known.

        It serves checks made before training, such as labels against the number of outputs,
        and must be cheap.
        """
        del feature
        return None


def refuse_stream(source: Source, what: str, instead: str) -> None:
    """Raises ConfigError if a source is a stream, of which `what` cannot be made."""
    if source.in_order_only:
        raise ConfigError(
            f'{what} needs random access, and a stream is read in order only: {instead}'
        )
