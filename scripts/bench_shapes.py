"""Expert layers that peers of `fourfold bench` are timed on, and the options that name them."""

import argparse
from collections.abc import Iterable

SHAPES = {  # E, H, I, K: names, aliases and sizes of bench/shapes.h
    "deepseek-v3": (256, 7168, 2048, 8),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v4-flash": (256, 4096, 2048, 6),
}
ALIASES = {"A": "deepseek-v3", "B": "qwen3-30b-a3b", "C": "deepseek-v4-flash"}


def names_of(parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]) -> list[str]:
    """Of a list with commas; exits with a usage error for one that is not known."""
    for name in text.split(","):
        if name not in known:
            parser.error(f"{option}: expected names of {', '.join(known)}, with commas, found {name}")
    return text.split(",")


def models_of(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """What --shape names."""
    return [ALIASES.get(name, name) for name in names_of(parser, "--shape", text, [*ALIASES, *SHAPES])]


def numbers_of(parser: argparse.ArgumentParser, option: str, text: str) -> list[int]:
    """Positive numbers with commas; exits with a usage error for others."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        parser.error(f"{option}: expected positive numbers with commas, found {text}")
    return values
