"""Data that `phalanx prepare` has written: a source that its directory describes."""

import os
from typing import Any

from trainer.data import dataset, statistics
from trainer.data.changed import Changed
from trainer.data.source import Source


class Prepared(Changed):
    """One split of prepared data.

    Attributes:
        numbers: the statistics of each numeric feature.

    Args:
        records: the source over its shards.
        described: what dataset.json says of it.
    """

    def __init__(self, records: Source, described: dict[str, Any]):
        super().__init__(records)
        self._fingerprint = described['fingerprint']
        numbers = described['statistics'].items()
        self.numbers = {feature: statistics.from_json(each) for feature, each in numbers}
        self.class_names = tuple(described.get('class_names', ()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the features and the checksums of the shards, as dataset.json has it."""
        return self._fingerprint

    def bounds(self, feature: str) -> tuple[float, float] | None:
        numbers = self.numbers.get(feature)
        if numbers is None or numbers.not_finite or not numbers.count:
            return None
        return float(numbers.min), float(numbers.max)


def prepared(directory: str | os.PathLike, split: str = 'train') -> Prepared:
    """Opens what `phalanx prepare` has written.

    Args:
        directory: the one that holds dataset.json, a path or a URL.
        split: 'train', or 'test' if the data was prepared with an EVAL_DATA.

    Returns:
        The source; it has the features, in the order of the records, of the one it was made of.

    Raises:
        ConfigError: it is no such directory, dataset.json is damaged, there is no such split, or a
            shard is missing, has another size, is one too many, or of another data set.
        OSError: the files are out of reach.
    """
    directory = os.path.expanduser(os.fspath(directory))
    described = dataset.read(directory)
    facts = dataset.split_of(described, split, directory)
    paths = dataset.shards(described, split, directory)
    if described['files'] == 'array_record':
        from trainer.data.array_record import ArrayRecords as Records
    else:
        from trainer.data.tfrecord import TFRecords as Records
    records = Records(paths, facts['features'])
    dataset.check_same(facts, paths, records.file_fingerprints)
    try:
        return Prepared(records, facts)
    except dataset.MALFORMED as error:
        raise dataset.damaged(directory, error) from None
