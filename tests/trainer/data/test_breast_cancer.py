import numpy as np
import tensorflow as tf

from trainer.data.breast_cancer import breast_cancer


def test_the_table_is_that_of_uci():
    source = breast_cancer()
    rows = source.fetch(tf.range(source.num_examples, dtype=tf.int64))
    assert source.class_names == ('benign', 'malignant')
    assert np.bincount(rows['diagnosis']).tolist() == [357, 212]
    # Least and greatest as UCI states them.
    assert len(rows) == 31
    for name, least, greatest in (('mean_radius', 6.981, 28.11), ('worst_area', 185.2, 4254.0)):
        assert (np.min(rows[name]), np.max(rows[name])) == (
            np.float32(least),
            np.float32(greatest),
        )
