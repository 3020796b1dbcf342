"""Loads a SavedModel with TensorFlow alone and compares its outputs; run as a program."""

import os
import sys


def main(directory: str, tolerance: float) -> int:
    """Returns 0 if `directory/model` maps features.npz to outputs.npz, else 1 and says why."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import numpy as np
    import tensorflow as tf

    signature = tf.saved_model.load(os.path.join(directory, 'model')).signatures['serving_default']

    def tensor(name, array):
        is_text = signature.structured_input_signature[1][name].dtype == tf.string
        return tf.io.parse_tensor(array.tobytes(), tf.string) if is_text else tf.constant(array)

    with np.load(os.path.join(directory, 'features.npz')) as features:
        raw = {name.removeprefix('_'): features[name] for name in features.files}
    got = signature(**{name: tensor(name, array) for name, array in raw.items()})
    with np.load(os.path.join(directory, 'outputs.npz')) as expected:
        for name in expected.files:
            if name not in got:
                print(f'the signature does not return {name!r}, but {sorted(got)}')
                return 1
            difference = np.abs(got[name].numpy().astype(np.float32) - expected[name]).max()
            scale = max(1.0, float(np.abs(expected[name]).max()))
            if not difference <= tolerance * scale:
                print(f'{name!r} differs from the trained model by {difference:g}')
                return 1
    return 0


if __name__ == '__main__':
    # Run by path, this folder heads the search path; the modules in it are not TensorFlow's.
    sys.path.pop(0)
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
