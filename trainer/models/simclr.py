"""Self-supervised pairs: an encoder that learns to tell two views of one image from all others.

Chen et al., 'A Simple Framework for Contrastive Learning of Visual Representations',
https://arxiv.org/abs/2002.05709.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.errors import ConfigError
from trainer.replicas import gather


class SimCLR(keras.Model):
    """An encoder and a projection; as a model, it maps images to what the encoder makes of them.

    Args:
        encoder: a model from images to class logits or vectors.
        projection: width of the vectors that are compared.
    """

    def __init__(self, encoder: keras.Model, projection: int, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.project = keras.Sequential(
            [
                keras.layers.Dense(4 * projection, activation='relu'),
                keras.layers.Dense(projection, dtype='float32'),
            ],
            name='projection',
        )

    def call(self, inputs, training=False):
        """Maps images, or a dict of the two views of each, to vectors [batch, width]."""
        images = inputs[min(inputs)] if isinstance(inputs, dict) else inputs
        vectors = self.encoder(images, training=training)
        self.project(vectors, training=training)  # So that it is built with the rest.
        return vectors

    def views(self, images, training: bool) -> tf.Tensor:
        """Maps images to unit vectors, float32 [batch, projection]."""
        vectors = self.project(self.encoder(images, training=training), training=training)
        return tf.math.l2_normalize(vectors, axis=-1)


def simclr(encoder: Callable[[], keras.Model], projection: int = 32) -> keras.Model:
    """Builds a `SimCLR`.

    Args:
        encoder: a function or class returning a model, uncalled, such as `@resnet`; what it calls
            classes are the numbers of the vector it makes.
        projection: width of the vectors that are compared.
    """
    return SimCLR(encoder(), projection, name='simclr')


def nt_xent(model, batch, training, temperature: float = 0.1):
    """The normalised, temperature-scaled cross-entropy of SimCLR, over the whole global batch.

    Args:
        model: a `SimCLR`.
        batch: whose inputs are a dict of two views, [batch, ...] each.
        training: whether the layers behave as in training.
        temperature: above 0; the smaller it is, the more the nearest others count.

    Returns:
        The losses, float32 [batch].

    Raises:
        ConfigError: the inputs are no two views.
    """
    if not isinstance(batch['inputs'], dict) or len(batch['inputs']) != 2:
        raise ConfigError(
            'nt_xent compares two views of each image. Set Data.source = @paired(), Data.inputs = '
            "('image', 'view') and Data.augment = @two_views()."
        )
    one, two = (model.views(batch['inputs'][name], training) for name in sorted(batch['inputs']))
    everyone = tf.concat([gather(one), gather(two)], 0)
    size, mine = tf.shape(everyone)[0] // 2, tf.shape(one)[0]
    context = tf.distribute.get_replica_context()
    index = 0 if context is None else context.replica_id_in_sync_group
    rows = index * mine + tf.range(mine)

    def loss(views, own, partner):
        similar = tf.matmul(views, everyone, transpose_b=True) / temperature
        similar -= 1e9 * tf.one_hot(own, 2 * size)  # An image is not compared with itself.
        return tf.nn.sparse_softmax_cross_entropy_with_logits(partner, similar)

    return 0.5 * (loss(one, rows, size + rows) + loss(two, size + rows, rows))
