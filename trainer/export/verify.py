"""Loads a SavedModel with TensorFlow alone and compares its outputs; run as a program."""

import os
import sys

SUFFIXES = '.in.npz', '.out.npz'


def main(directory: str, tolerance: float) -> int:
    """Returns 0 if the signatures of `directory/model` return what they should; else 1, and why.

    For the signature NAME, `NAME.in.npz` has its arguments and `NAME.out.npz` what is expected.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import tensorflow as tf

    signatures = tf.saved_model.load(os.path.join(directory, 'model')).signatures
    for file in sorted(os.listdir(directory)):
        if file.endswith(SUFFIXES[0]):
            name = file.removesuffix(SUFFIXES[0])
            wrong = _wrong(signatures[name], os.path.join(directory, name), tolerance)
            if wrong:
                print(f'{name}: {wrong}')
                return 1
    return 0


def _wrong(signature, path: str, tolerance: float) -> str:
    """Says in which way a signature does not return what it should; '' if it does."""
    import numpy as np
    import tensorflow as tf

    def tensor(array, dtype):
        is_text = dtype == tf.string
        return tf.io.parse_tensor(array.tobytes(), tf.string) if is_text else tf.constant(array)

    specs = signature.structured_input_signature[1]
    with np.load(path + SUFFIXES[0]) as inputs:
        raw = {name.removeprefix('_'): inputs[name] for name in inputs.files}
    got = signature(**{name: tensor(array, specs[name].dtype) for name, array in raw.items()})
    with np.load(path + SUFFIXES[1]) as outputs:
        for name in (file.removeprefix('_') for file in outputs.files):
            if name not in got:
                return f'it does not return {name!r}, but {sorted(got)}'
            expected, dtype = outputs[f'_{name}'], got[name].dtype
            if not dtype.is_floating:
                if not np.array_equal(got[name].numpy(), tensor(expected, dtype).numpy()):
                    return f'{name!r} is not what the trained model returns'
                continue
            difference = np.abs(got[name].numpy().astype(np.float32) - expected).max()
            scale = max(1.0, float(np.abs(expected).max()))
            if not difference <= tolerance * scale:
                return f'{name!r} differs from the trained model by {difference:g}'
    return ''


if __name__ == '__main__':
    # Run by path, this folder heads the search path; the modules in it are not TensorFlow's.
    sys.path.pop(0)
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
