"""Whether mlx-lm's ``keys`` and ``num_layers`` reach every module an adapter has arrays for, and such as do.

mlx-lm makes LoRA layers of what its config names and refuses a folder with arrays for others. The arrays say what was
trained, so where a config falls short of them (``keys: ["auto"]``, too few layers) it is the config that is amended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

BLOCK_MODULE = re.compile(r"(?P<stem>(?:.+\.)?(?:layers|h))\.(?P<layer>\d+)\.(?P<key>.+)")


def covers(keys: Sequence[str], num_layers: int, modules: Iterable[str], depth: int | None = None) -> bool:
    """True when the config reaches all ``modules`` in a model of ``depth`` blocks, else of as many as they show.

    No keys are all linear layers of the blocks. A key is a name inside a block, for the last ``num_layers`` blocks
    (all, when that is not positive), or a whole name, for any.
    """
    named = set(keys)
    places = {module: BLOCK_MODULE.fullmatch(module) for module in modules}
    depth = depth or max((int(place["layer"]) + 1 for place in places.values() if place), default=0)
    first = depth - num_layers if num_layers > 0 else 0
    return all(
        module in named or (place is not None and int(place["layer"]) >= first and (not named or place["key"] in named))
        for module, place in places.items()
    )


def covering(modules: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """``keys`` and ``num_layers`` that reach all ``modules``; blocks that have less get layers of zeros, no harm.

    Names inside a block where all blocks are one model's; else whole names, which mlx-lm looks up anywhere.
    """
    places = {module: BLOCK_MODULE.fullmatch(module) for module in modules}
    short = len({place["stem"] for place in places.values() if place}) == 1
    keys = dict.fromkeys(place["key"] if place and short else module for module, place in places.items())
    return tuple(keys), -1
