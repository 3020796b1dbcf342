"""A generative adversarial network for small images: two losses and two optimizers in one step.

Goodfellow et al., 'Generative Adversarial Networks', https://arxiv.org/abs/1406.2661; the layout is
that of Radford et al., 'Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks', https://arxiv.org/abs/1511.06434, with layer normalisation, which does not
depend on how a batch is shared.
"""

import keras
import tensorflow as tf


class GAN(keras.Model):
    """A generator and a discriminator; as a model, it judges images.

    Args:
        input_shape: rows, columns, channels of an image; rows and columns are multiples of 4.
        latent: numbers that an image is made of.
        filters: channels of the generator's last hidden layer.
    """

    def __init__(self, input_shape: tuple[int, int, int], latent: int, filters: int, **kwargs):
        super().__init__(**kwargs)
        layers, (rows, columns, channels) = keras.layers, input_shape
        self.latent = latent
        self.noise = keras.random.SeedGenerator(0)
        self.generator = keras.Sequential(
            [
                layers.Dense(rows // 4 * (columns // 4) * 2 * filters),
                layers.Reshape((rows // 4, columns // 4, 2 * filters)),
                layers.LayerNormalization(),
                layers.LeakyReLU(0.2),
                layers.Conv2DTranspose(filters, 4, 2, 'same'),
                layers.LayerNormalization(),
                layers.LeakyReLU(0.2),
                layers.Conv2DTranspose(channels, 4, 2, 'same', activation='sigmoid'),
            ],
            name='generator',
        )
        self.discriminator = keras.Sequential(
            [
                layers.Conv2D(filters, 4, 2, 'same'),
                layers.LeakyReLU(0.2),
                layers.Conv2D(2 * filters, 4, 2, 'same'),
                layers.LeakyReLU(0.2),
                layers.Flatten(),
                layers.Dense(1, dtype='float32'),
            ],
            name='discriminator',
        )

    def call(self, inputs, training=False):
        """Maps images in 0..1 to how real they look, logits [batch, 1]."""
        self.generator(keras.ops.zeros((1, self.latent)), training=training)  # To be built.
        return self.discriminator(inputs, training=training)

    def generate(self, count, training=False):
        """Returns so many new images, in 0..1."""
        noise = keras.random.normal((count, self.latent), seed=self.noise)
        return self.generator(noise, training=training)

    def signatures(self):
        """Offers `generate`: noise, float32 [batch, latent], of normal numbers -> images."""

        @tf.function(input_signature=[tf.TensorSpec([None, self.latent], tf.float32, 'noise')])
        def generate(noise):
            return {'images': self.generator(noise, training=False)}

        return {'generate': (generate, {'noise': tf.ones([2, self.latent])})}


def gan(input_shape: tuple[int, int, int], latent: int = 64, filters: int = 32) -> keras.Model:
    """Builds a `GAN`."""
    return GAN(input_shape, latent, filters, name='gan')


def gan_losses(model, batch, training):
    """The losses of both players, each of which is to train its own variables.

    Args:
        model: a `GAN`.
        batch: real images.
        training: whether the layers behave as in training.

    Returns:
        'discriminator' and 'generator', float32 [batch]; the second in the form that does not
        saturate.
    """
    images = batch['inputs']
    made = model.generate(tf.shape(images)[0], training=training)
    real, fake = (model.discriminator(each, training=training)[:, 0] for each in (images, made))
    return {
        'discriminator': 0.5 * (tf.nn.softplus(-real) + tf.nn.softplus(fake)),
        'generator': tf.nn.softplus(-fake),
    }
