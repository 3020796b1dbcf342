"""The versions that a run's results depend on."""

import platform

__version__ = '0.1.0'


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that compute."""
    import keras
    import numpy
    import tensorflow

    return {
        'phalanx': __version__,
        'python': platform.python_version(),
        'tensorflow': tensorflow.__version__,
        'keras': keras.__version__,
        'numpy': numpy.__version__,
    }
