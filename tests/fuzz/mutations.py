"""Changes to bytes that parsers of binary headers get wrong: lengths, counts, cuts, repeats, splices."""

import random
from collections.abc import Callable, Sequence

# Borders of the integer widths such files use, and values near small counts.
INTERESTING = sorted(
    {
        value % 2**64
        for power in (0, 3, 5, 7, 8, 15, 16, 31, 32, 61, 62, 63, 64)
        for value in (2**power - 1, 2**power, 2**power + 1, -(2**power))
    }
)
Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def flip_bit(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_at(rng, data)] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_at(rng, data)] = rng.choice((0, 1, 0x22, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def set_integer(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    width = rng.choice((1, 2, 4, 8))
    at = _at(rng, data)
    data[at : at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, "little")


def change_integer(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    width, at = rng.choice((4, 8)), _at(rng, data)
    value = int.from_bytes(data[at : at + width], "little") + rng.choice((-32, -1, 1, 32))
    data[at : at + width] = (value % 256**width).to_bytes(width, "little")


def cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_at(rng, data) :]


def drop(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    del data[at : at + rng.choice((1, 4, 8, 64))]


def repeat(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    part = data[at : at + rng.choice((1, 8, 40, 200))]
    data[at:at] = part * rng.choice((1, 1, 30))


def splice(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    at = rng.randrange(len(other) + 1)
    data[_at(rng, data) :] = other[at:]


def put_word(rng: random.Random, data: bytearray, words: Sequence[bytes]) -> None:
    """Over what is there, or between."""
    word, at = rng.choice(words), _at(rng, data)
    data[at : at + (len(word) if rng.random() < 0.5 else 0)] = word


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit,
    set_byte,
    set_integer,
    set_integer,
    change_integer,
    cut,
    drop,
    repeat,
    splice,
)


def mutated(rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One seed with one to four changes, most of them near its start, where headers are.

    words: of the format's dictionary; one change in five puts one of them somewhere.
    """
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        if words and rng.random() < 0.2:
            put_word(rng, data, words)
        else:
            rng.choice(MUTATIONS)(rng, data, seeds)
    return bytes(data)


def _at(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(min(len(data), 4096))
