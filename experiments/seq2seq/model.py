"""A small transformer (Vaswani et al. 2017, arXiv:1706.03762) that is trained on the right digits so far.

The targets are an input, so that the masked loss is a tensor of the graph; the model for decoding has the same
weights and no targets.
"""

import keras
import numpy as np
from keras import layers, ops

import tfloop
from experiments.seq2seq import data


def build(units=64, heads=4):
    """The training model: words, the digits given so far and those wanted in; logits and attention out.

    Shapes: words (n, 13), given and wanted (n, 7), logits (n, 7, 13), attention (n, heads, 7, 13).
    """
    words = keras.Input((data.MOST_WORDS,), dtype="int32", name="words")
    given = keras.Input((data.MOST_DIGITS,), dtype="int32", name="given")
    wanted = keras.Input((data.MOST_DIGITS,), dtype="int32", name="wanted")

    spoken = words != data.PAD
    memory = embedded(words, len(data.WORDS), units, "words_embedding")
    for name in ("encoder_0", "encoder_1"):
        attend = layers.MultiHeadAttention(heads, units // heads, name=name)
        memory = block(memory, attend(memory, memory, attention_mask=spoken[:, None, :]), units, name)

    state = embedded(given, len(data.DIGITS), units, "digits_embedding")
    attend = layers.MultiHeadAttention(heads, units // heads, name="decoder_self")
    state = block(state, attend(state, state, use_causal_mask=True), units, "decoder_self")
    attend = layers.MultiHeadAttention(heads, units // heads, name="decoder_words")
    attended, scores = attend(state, memory, attention_mask=spoken[:, None, :], return_attention_scores=True)
    state = block(state, attended, units, "decoder_words")
    logits = layers.Dense(len(data.DIGITS), dtype="float32", name="logits")(state)

    inputs = {"words": words, "given": given, "wanted": wanted}
    model = tfloop.Model(inputs, {"logits": logits, "attention": scores})
    counts = ops.cast(wanted != data.PAD, "float32")
    crossentropy = ops.sparse_categorical_crossentropy(wanted, logits, from_logits=True)
    model.add_loss(ops.sum(crossentropy * counts) / ops.sum(counts), name="crossentropy")
    right = ops.cast(ops.equal(ops.argmax(logits, -1), wanted), "float32")
    model.add_metric(ops.sum(right * counts) / ops.sum(counts), name="digits_right")
    return model


def embedded(tokens, size, units, name):
    """What a token is and where it stands, added."""
    places = layers.Embedding(tokens.shape[1], units, name=f"{name}_places")
    return layers.Embedding(size, units, name=name)(tokens) + places(ops.arange(tokens.shape[1]))


def block(x, attended, units, name):
    """What follows an attention: residual, norm, two dense layers, residual, norm."""
    x = layers.LayerNormalization(name=f"{name}_norm_1")(x + attended)
    hidden = layers.Dense(2 * units, activation="relu", name=f"{name}_hidden")(x)
    return layers.LayerNormalization(name=f"{name}_norm_2")(x + layers.Dense(units, name=f"{name}_out")(hidden))


def decode(model, words):
    """The signs (n, 7) that a training model reads in `words`, each chosen as the likeliest after those before."""
    prediction = tfloop.without_inputs(model, ["wanted"])
    signs = np.full((len(words), data.MOST_DIGITS + 1), data.PAD, "int32")
    signs[:, 0] = data.START
    for place in range(data.MOST_DIGITS):
        logits = prediction.predict({"words": words, "given": signs[:, :-1]}, batch_size=500, verbose=0)["logits"]
        signs[:, place + 1] = logits[:, place].argmax(-1)
    return signs[:, 1:]


def attention(model, words, signs):
    """How much each sign looks at each word when it is chosen, averaged over heads: (n, 7, 13)."""
    prediction = tfloop.without_inputs(model, ["wanted"], outputs="attention")
    given = np.concatenate([np.full_like(signs[:, :1], data.START), signs[:, :-1]], axis=1)
    return prediction.predict({"words": words, "given": given}, verbose=0).mean(axis=1)
