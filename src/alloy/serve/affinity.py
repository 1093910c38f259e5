"""Which replica a prompt goes to: one that has computed the beginning of it, unless that one has too much to do.

What replicas hold is guessed from what was sent to them: a prompt is cut into runs of tokens, and the key of a run stands
for all tokens up to its end. The bound on the load is that of Consistent Hashing with Bounded Loads (Mirrokni et al.,
2017), section 2. arXiv:1608.01350
"""

import math
import random
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from itertools import takewhile

from alloy.engine.request import Request

RUN = 16
# runs remembered of each replica: a million tokens
MOST_RUNS = 65_536
# a replica may have so many times the mean load and still be sent what it knows
BOUND = 1.5


class Affinity:
    """Remembers what was sent where; replicas go by name."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        # least recently sent first
        self._known: dict[str, OrderedDict[int, None]] = {}

    def choose(self, request: Request, loads: Mapping[str, int]) -> str | None:
        """The replica that a request is to go to; None: there is none.

        Args:
            request: whose prompt is looked up
            loads: requests in flight of each replica that can be chosen
        """
        keys = _keys(request)
        most = math.ceil(BOUND * (sum(loads.values()) + 1) / max(1, len(loads)))
        shared = {name: self._shared(name, keys) for name, load in loads.items() if load < most}
        longest = max(shared.values(), default=0)
        holders = [name for name, runs in shared.items() if runs == longest > 0]
        two = self._random.sample(list(loads), min(2, len(loads)))
        return min(holders or two, key=loads.__getitem__, default=None)

    def note(self, request: Request, name: str) -> None:
        """Remember that a replica computes a prompt."""
        known = self._known.setdefault(name, OrderedDict())
        for key in _keys(request):
            known[key] = None
            known.move_to_end(key)
        while len(known) > MOST_RUNS:
            known.popitem(last=False)

    def keep(self, names: Container[str]) -> None:
        """Forget replicas that are gone."""
        self._known = {name: known for name, known in self._known.items() if name in names}

    def _shared(self, name: str, keys: Iterable[int]) -> int:
        known = self._known.get(name, OrderedDict[int, None]())
        return sum(1 for _ in takewhile(known.__contains__, keys))


def _keys(request: Request) -> list[int]:
    """A key for each whole run."""
    tokens, keys = tuple(request.token_ids), [hash(request.salt)]
    for end in range(RUN, len(tokens) + 1, RUN):
        keys.append(hash((keys[-1], tokens[end - RUN : end])))
    return keys[1:]
