"""What a recipe's `zero` says."""

from pathlib import Path


def deepspeed_file(zero: str) -> Path:
    """DeepSpeed's configuration for a recipe's `zero`, which is not "none"."""
    return Path(__file__).parents[2] / "scripts" / f"zero{zero}.json"


def shards_weights(zero: str) -> bool:
    """Whether a rank holds 1/N of the weights under a recipe's `zero`."""
    return zero.startswith("3")
