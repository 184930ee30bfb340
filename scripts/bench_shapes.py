"""Expert layers that peers of `fourfold bench` are timed on: names, aliases and sizes of bench/shapes.h."""

SHAPES = {  # E, H, I, K
    "deepseek-v3": (256, 7168, 2048, 8),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v4-flash": (256, 4096, 2048, 6),
}
ALIASES = {"A": "deepseek-v3", "B": "qwen3-30b-a3b", "C": "deepseek-v4-flash"}
