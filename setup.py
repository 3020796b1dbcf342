"""Builds and installs Phalanx: `pip install .`, or `pip install -e '.[dev]'` to work on it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'trainer' / 'version.py').read_text())[1]
README = ROOT / 'README.md'

# The ranges are narrow: the step replaces a private method of Keras's optimizers, the strategy one
# of TensorFlow's.
TENSORFLOW_RANGE = '>=2.21,<2.22'

# What some kinds of data need.
DATA = {
    'records': ['array_record>=0.8,<0.9', 'google-crc32c>=1.6,<2'],
    's3': ['s3fs>=2025.3,<2027'],
    'gcs': ['gcsfs>=2025.3,<2027'],
    'http': ['fsspec[http]>=2025.3,<2027'],
    'tfds': ['tensorflow-datasets>=4.9.10,<5', 'importlib_resources>=5'],
    'arrow': ['pyarrow>=18,<27'],
    'text': ['tokenizers>=0.21,<0.24'],
}

# Beside s3fs pip takes 36: the botocore of that wants an older python-dateutil than 37 does.
KUBERNETES = ['kubernetes>=36,<38', 'PyYAML>=6']
OPTUNA = ['optuna>=4,<5']

setup(
    name='phalanx',
    version=VERSION,
    description='Synchronous data-parallel training on tf.distribute, configured with gin.',
    long_description=README.read_text() if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10,<3.14',
    # In a wheel the configs lie inside the package; in a checkout, beside it.
    packages=[*find_packages(include=['trainer*', 'launch*']), 'trainer.configs'],
    package_dir={'trainer.configs': 'configs'},
    package_data={'trainer.configs': ['*.gin', '*/*.gin'], 'trainer.data': ['*.npz', '*.csv']},
    install_requires=[
        'absl-py>=2.1',
        'gin-config==0.5.*',
        'grpcio>=1.60,<2',
        'keras>=3.12,<3.16',  # 3.12 is the last for Python 3.10.
        'numpy>=1.26',
        'psutil>=5.9,<8',
        'rich>=13,<16',
        f'tensorflow{TENSORFLOW_RANGE}',
        # Not among TensorFlow 2.21's own requirements, but its summaries need it.
        'tensorboard>=2.20,<2.22',
        'typeguard>=4.3,<5',
    ],
    extras_require={
        'gpu': [f'tensorflow[and-cuda]{TENSORFLOW_RANGE}'],
        'plot': ['matplotlib>=3.8,<4'],
        # For sweeps that search.
        'optuna': OPTUNA,
        # To submit to a Ray cluster. Not among those of `dev`: it takes 400 MB.
        'ray': ['ray[default]>=2.50,<3'],
        'kubernetes': KUBERNETES,
        **DATA,
        'dev': [
            *(package for packages in DATA.values() for package in packages),
            *KUBERNETES,
            *OPTUNA,
            'gcp-storage-emulator>=2024.8.3',
            'kubeflow-trainer-api>=2.3,<3',
            'matplotlib>=3.8,<4',
            'moto[server]>=5,<6',
            'pillow>=10,<14',
            'pytest>=8',
            'pytest-xdist>=3',
            'ruff>=0.17,<0.18',
        ],
    },
    entry_points={'console_scripts': ['phalanx=launch.__main__:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
