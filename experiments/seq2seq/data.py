"""English number words and the digits that they mean, made here: `twelve thousand and four` -> `12004`."""

import numpy as np

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ["<pad>", *ONES, *TENS, "hundred", "thousand", "and"]
DIGITS = ["<pad>", *"0123456789", "<start>", "<end>"]
PAD, START, END = 0, DIGITS.index("<start>"), DIGITS.index("<end>")
LIMIT = 1_000_000
MOST_WORDS = 13  # three hundred and forty five thousand six hundred and seventy eight
MOST_DIGITS = 7  # six, and the end


def words(n):
    """The words of a number below a million."""
    if n >= 1000:
        rest = n % 1000
        joined = ["and", *words(rest)] if 0 < rest < 100 else words(rest) if rest else []
        return [*words(n // 1000), "thousand", *joined]
    if n >= 100:
        return [ONES[n // 100], "hundred", *(["and", *words(n % 100)] if n % 100 else [])]
    if n >= 20:
        return [TENS[n // 10 - 2], *(words(n % 10) if n % 10 else [])]
    return [ONES[n]]


def encode(numbers):
    """The inputs of the training model, as a dictionary of int arrays padded with 0.

    `words` (n, 13), `given` (n, 7): the digits shifted by a start sign, `wanted` (n, 7): the digits and an
    end sign.
    """
    spoken = np.zeros((len(numbers), MOST_WORDS), "int32")
    wanted = np.zeros((len(numbers), MOST_DIGITS), "int32")
    for row, number in enumerate(numbers):
        said = [WORDS.index(word) for word in words(number)]
        signs = [*(DIGITS.index(digit) for digit in str(number)), END]
        spoken[row, : len(said)], wanted[row, : len(signs)] = said, signs
    given = np.concatenate([np.full((len(numbers), 1), START, "int32"), wanted[:, :-1]], axis=1)
    return {"words": spoken, "given": np.where(given == END, PAD, given), "wanted": wanted}


def digits(signs):
    """The digits up to the end sign, as a string."""
    signs = list(signs)
    return "".join(DIGITS[sign] for sign in signs[: signs.index(END)] if sign) if END in signs else "?"


def numbers(train=20_000, test=2_000, seed=0):
    """Two disjoint samples of numbers below a million, as many of each length as there are."""
    rng = np.random.default_rng(seed)
    drawn = np.unique((10 ** rng.uniform(0, 6, size=4 * (train + test))).astype(int) % LIMIT)
    drawn = rng.permutation(drawn)
    return drawn[test : test + train], drawn[:test]
