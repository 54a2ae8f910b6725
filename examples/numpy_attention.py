"""Attention step by step, on two words, in plain NumPy; then each step's result by fastattn, equal.

    python examples/numpy_attention.py

The words are "Thinking Machines". Their vectors and all weights are drawn at random and rounded to one digit,
so that every number can be followed by hand: nothing is learned here, and the weights mean nothing yet. What
training makes of them is in the other examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fastattn as fa

ENGLISH = ["Thinking", "Machines"]
FRENCH = ["Machines", "qui", "pensent"]  # a translation, as far as it is written
EMBEDDING, HEAD, HEADS = 4, 3, 8  # columns of a word's vector, of a query, key and value; number of heads


@dataclass
class Result:
    """One variant, computed by hand: what went in, who looked at whom, and what came out."""

    name: str
    query: np.ndarray  # (heads, queries, HEAD), or (queries, HEAD) of one head
    key: np.ndarray
    value: np.ndarray
    weights: np.ndarray  # (..., queries, keys)
    out: np.ndarray
    causal: bool = False


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw normal numbers, rounded to one digit."""
    return rng.normal(size=shape).round(1)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Make each row positive, with sum 1; the largest score gets the largest share.

    Without the subtraction exp would overflow from scores of 710 on; it changes no share, since it multiplies
    all of them by the same number.
    """
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def show(label: str, array: np.ndarray, names: Sequence[str] = ()) -> None:
    """Print the rows of `array`, each with its name."""
    for row, line in enumerate(array):
        name = f"  {names[row]}" if names else ""
        print(f"   {label if row == 0 else '':<34}[{' '.join(f'{number:6.2f}' for number in line)}]{name}")


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, names: Sequence[str], causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(Q K^T / sqrt(d)) V for one head, each step printed; returns the weights and Z."""
    # How well does each query go with each key? The dot product is large where they point the same way.
    scores = query @ key.T
    show("similarity  Q K^T", scores, names)
    # A sum of d products of variance 1 has variance d. Divided by sqrt(d) it stays in the range where softmax
    # is soft, and its gradient alive, however many columns there are.
    scores = scores / np.sqrt(query.shape[-1])
    show(f"scale       / sqrt({query.shape[-1]})", scores, names)
    if causal:
        # While a text is written its later words do not exist. exp(-inf) is 0: they get no share.
        later = np.triu(np.ones(scores.shape, dtype=bool), k=1)
        scores = np.where(later, -np.inf, scores)
        show("mask        later = -inf", scores, names)
    weights = softmax(scores)
    show("softmax     rows sum to 1", weights, names)
    # Each word becomes a mixture of all values, in these shares.
    mixed = weights @ value
    for row, shares in enumerate(weights):
        sum_of_values = " + ".join(f"{share:.2f} v{column + 1}" for column, share in enumerate(shares))
        show(f"Z{row + 1} = {sum_of_values}", mixed[row : row + 1])
    return weights, mixed


def self_attention(words: np.ndarray, rng: np.random.Generator) -> Result:
    """Query, key and value are three views of the same words."""
    print("\n1. Self-attention: the words look at each other, each at itself as well\n")
    for row, name in enumerate(ENGLISH):
        show(f"X{row + 1}", words[row : row + 1], [name])
    # What a word looks for, what it offers to be found by, and what it then says are different things:
    # three matrices, learned in a real model, make the three of them from its vector.
    projections = [numbers(rng, EMBEDDING, HEAD) for _ in range(3)]
    for letter, projection in zip("QKV", projections, strict=True):
        show(f"projection  W_{letter}", projection)
    query, key, value = (words @ projection for projection in projections)
    show("query       Q = X W_Q", query, ENGLISH)
    show("key         K = X W_K", key, ENGLISH)
    show("value       V = X W_V", value, ENGLISH)
    weights, out = attend(query, key, value, ENGLISH)
    return Result("self-attention", query, key, value, weights, out)


def shared_keys_and_values(words: np.ndarray, rng: np.random.Generator) -> Result:
    """K = V, as in Bahdanau et al., 2014: the states that are scored are those that are mixed."""
    print("\n2. K = V: what a word is found by is also what it says, one matrix fewer\n")
    query, key = (words @ numbers(rng, EMBEDDING, HEAD) for _ in range(2))
    show("query       Q = X W_Q", query, ENGLISH)
    show("key, value  K = V = X W_K", key, ENGLISH)
    weights, out = attend(query, key, key, ENGLISH)
    return Result("K = V", query, key, key, weights, out)


def cross_attention(words: np.ndarray, translated: np.ndarray, rng: np.random.Generator) -> Result:
    """Queries of one text, keys and values of another: for each query a mixture of the other's words."""
    print("\n3. Cross-attention: the words of a translation, Y, look at those of the original, X\n")
    for row, name in enumerate(FRENCH):
        show(f"Y{row + 1}", translated[row : row + 1], [name])
    query = translated @ numbers(rng, EMBEDDING, HEAD)
    key, value = (words @ numbers(rng, EMBEDDING, HEAD) for _ in range(2))
    show("query       Q = Y W_Q", query, FRENCH)
    show("key         K = X W_K", key, ENGLISH)
    show("value       V = X W_V", value, ENGLISH)
    weights, out = attend(query, key, value, FRENCH)
    return Result("cross-attention", query, key, value, weights, out)


def masked_attention(translated: np.ndarray, rng: np.random.Generator) -> Result:
    """Self-attention of a text that is being written: no word sees those after it."""
    print("\n4. Masked self-attention: the words of the translation look back, never ahead\n")
    query, key, value = (translated @ numbers(rng, EMBEDDING, HEAD) for _ in range(3))
    show("query       Q = Y W_Q", query, FRENCH)
    show("key         K = Y W_K", key, FRENCH)
    show("value       V = Y W_V", value, FRENCH)
    weights, out = attend(query, key, value, FRENCH, causal=True)
    return Result("masked self-attention", query, key, value, weights, out, causal=True)


def multi_head_attention(
    words: np.ndarray, rng: np.random.Generator
) -> tuple[Result, np.ndarray, np.ndarray]:
    """Heads with matrices of their own, side by side; also returns the last projection and its result."""
    print(f"\n5. Multi-head self-attention: {HEADS} heads with matrices of their own look for other things\n")
    projections = numbers(rng, 3, HEADS, EMBEDDING, HEAD)
    # (2, 4) @ (8, 4, 3): NumPy multiplies the words by the matrix of each head, to (8, 2, 3).
    query, key, value = words @ projections
    weights = softmax(query @ key.swapaxes(-1, -2) / np.sqrt(HEAD))
    out = weights @ value
    for head in range(HEADS):
        show(f"softmax of head {head}", weights[head], ENGLISH)
    # (8, 2, 3) -> (2, 8 * 3): the heads of a word stand side by side...
    concatenated = out.swapaxes(0, 1).reshape(len(words), HEADS * HEAD)
    # ... and one more matrix mixes them, back to the columns that X had, so that layers can be stacked.
    projection = numbers(rng, HEADS * HEAD, EMBEDDING)
    projected = concatenated @ projection
    print(f"   {'concatenated':<34}{concatenated.shape}\n   {'projection  W_O':<34}{projection.shape}")
    show("Z           = concatenated W_O", projected, ENGLISH)
    return Result("multi-head self-attention", query, key, value, weights, out), projection, projected


def by_fastattn(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """The same call by fastattn, whose axes are (batch, heads, words, columns)."""
    heads = [np.reshape(rows, (1, -1, *rows.shape[-2:])) for rows in (result.query, result.key, result.value)]
    out, weights = fa.attention(*heads, causal=result.causal, return_weights=True)
    return out.reshape(result.out.shape), weights.reshape(result.weights.shape)


def draw(results: Sequence[Result], folder: Path) -> Path:
    """Draw the weights of the heads of the last variant."""
    from fastattn import viz

    return viz.save(
        viz.heatmap(results[-1].weights, ENGLISH, columns=4, title="What each head makes of two words"),
        folder / "numpy_attention.png",
    )


def main(argv: Sequence[str] | None = None) -> float:
    """Print the steps, check them, and return the largest difference between NumPy and fastattn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--seed", type=int, default=1, help="draws the words' vectors and the weights (default: 1)"
    )
    parser.add_argument("--out", type=Path, help="folder for a picture of the heads (needs fastattn[viz])")
    arguments = parser.parse_args(argv)

    rng = np.random.default_rng(arguments.seed)
    words, translated = numbers(rng, len(ENGLISH), EMBEDDING), numbers(rng, len(FRENCH), EMBEDDING)
    results = [
        self_attention(words, rng),
        shared_keys_and_values(words, rng),
        cross_attention(words, translated, rng),
        masked_attention(translated, rng),
    ]
    heads, projection, projected = multi_head_attention(words, rng)
    results.append(heads)

    print("\n6. The same by fastattn.attention(query, key, value)\n")
    largest = 0.0
    for result in results:
        out, weights = by_fastattn(result)
        np.testing.assert_allclose(weights, result.weights, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(out, result.out, rtol=1e-12, atol=1e-12)
        difference = float(abs(out - result.out).max())
        largest = max(largest, difference)
        print(f"   {result.name:<34}equal, at most {difference:.0e} apart")
    concatenated = out.swapaxes(0, 1).reshape(len(words), HEADS * HEAD)
    np.testing.assert_allclose(concatenated @ projection, projected, rtol=1e-12, atol=1e-12)
    if arguments.out:
        print(f"\npicture: {draw(results, arguments.out)}")
    return largest


if __name__ == "__main__":
    main()
