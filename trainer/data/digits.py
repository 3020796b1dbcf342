"""1,797 handwritten digits that come with the package: real data without a download.

They are the test set of 'Optical Recognition of Handwritten Digits' (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), in the order in which scikit-learn ships it;
converted to unsigned bytes and otherwise unchanged.
"""

from pathlib import Path

import numpy as np

from trainer.data.arrays import Arrays
from trainer.errors import ConfigError, nearest

_NUM_TRAIN = 1500
_SPLITS = {'train': slice(0, _NUM_TRAIN), 'test': slice(_NUM_TRAIN, None)}


def digits(split: str = 'train') -> Arrays:
    """Loads the digits.

    Args:
        split: 'train', the first 1,500 digits, or 'test', the other 297.

    Returns:
        A source with `image` (uint8 [8, 8, 1], 0 to 16) and `label` (int64, 0 to 9).

    Raises:
        ConfigError: The split is another one.
    """
    if split not in _SPLITS:
        raise ConfigError(
            f"digits has the splits 'train' and 'test', not {split!r}."
            + nearest(str(split), _SPLITS)
        )
    with np.load(Path(__file__).with_name('digits.npz'), allow_pickle=False) as file:
        return Arrays({name: file[name][_SPLITS[split]] for name in file.files})
