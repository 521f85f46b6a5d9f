"""An unmodified Flax model at every precision from 1 to 8 bits, out of one set of packed weights.

A small convolutional network learns handwritten digits. Then the same `model.apply` runs on bitlayers: all layers at
one precision, and each layer alone at a low one, which shows what it needs. Prints a table and draws it.
"""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import sklearn.datasets

import pbjax


class CNN(nn.Module):
    """Nothing in it knows of bitlayers."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))


def train(model: CNN, images: jax.Array, labels: jax.Array, steps: int):
    optimizer, params = optax.adam(3e-3), model.init(jax.random.key(0), images[:1])

    def loss(params, rows):
        logits = model.apply(params, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry, rows):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], rows), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    batches = jax.random.randint(jax.random.key(1), (steps, 64), 0, len(images))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[0])((params, optimizer.init(params)))[0]


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("unmodified_model.png"))
    args = parser.parse_args(argv)
    digits = sklearn.datasets.load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    model, test = CNN(), (images[:300], labels[:300])
    params = train(model, images[300:], labels[300:], args.steps)

    qparams = pbjax.quantize(params, bits=8, fn=model.apply, args=(images,))
    layers = sorted(params["params"])

    @jax.jit  # compiled once for all of the 40 precisions below
    def accuracy(qparams, bitlayers, images, labels):
        qparams = pbjax.with_bitlayers(qparams, dict(zip(layers, bitlayers, strict=True)))
        return (pbjax.quantized(model.apply)(qparams, images).argmax(-1) == labels).mean()

    exact, curves = float((model.apply(params, test[0]).argmax(-1) == test[1]).mean()), {}
    print(f"{'bitlayers':>14}{''.join(f'{b:>7}' for b in range(1, 9))}   float32: {exact:.1%}")
    for name in ("all layers", *layers):  # a layer alone: the others keep all 8
        counts = [[b if name in ("all layers", layer) else 8 for layer in layers] for b in range(1, 9)]
        curves[name] = [float(accuracy(qparams, jnp.array(count), *test)) for count in counts]
        print(f"{name:>14}{''.join(f'{value:7.1%}' for value in curves[name])}")
        plt.plot(range(1, 9), curves[name], marker="o", linewidth=3 if name == "all layers" else 1, label=name)
    plt.axhline(exact, color="gray", linestyle="--", label="float32")
    plt.gca().set(xlabel="bitlayers", ylabel="accuracy on 300 digits", title="all layers, or one with the others at 8")
    plt.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(args.output, dpi=120, bbox_inches="tight")
    return curves


if __name__ == "__main__":
    main()
