"""Prefix reuse: one radix tree over tokens that holds blocks of keys and values, and states at exact positions.

Attention can go on after any prefix whose keys are there; a recurrent layer only where its state was kept. A hit is thus as
long as the deepest node, within what the prompt shares, that has a snapshot (of a model without recurrent layers: all of
what it shares). Keys compare tokens, never hashes. serving.md section 4.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from alloy.models.paged import PagedCache, blocks_of
from alloy.ops.attention import BLOCK

# why a snapshot was taken: on the way through a long prompt, where prompts part, where the caller asked for it, at the end of a
# prompt, of an answer; or that it was used
Kind = Literal["way", "branch", "asked", "prompt", "answer", "used"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# what becomes of snapshots counts this much after the next one of their kind
FADE = 0.98
# a kind of which nothing is known counts as one that is used once in so many times
UNKNOWN = 20
# while no kind is used more often than this, the newest snapshot goes so often, else the least recently used
LITTLE, NEWEST = 0.06, 0.75


@dataclass(slots=True)
class Snapshot:
    """State after a node's last token.

    Attributes:
        slot: of the cache, which the snapshot owns
        kind: says how likely it is wanted
        tokens: what the multi-token prediction has not seen yet, without the token that follows
        hidden: (tokens + 1, hidden) the hidden states those tokens followed, and that of the node's last token; None: the
            engine makes no drafts
    """

    slot: int
    kind: Kind
    tokens: tuple[int, ...] = ()
    hidden: Tensor | None = None


@dataclass(eq=False)
class Node:
    """A run of tokens; it ends where its children differ or where a snapshot was taken.

    Attributes:
        start: tokens before the run
        blocks: blocks of keys that hold the run, the first of which may begin before it; and the same of multi-token
            prediction
    """

    start: int
    tokens: tuple[int, ...]
    parent: "Node | None"
    blocks: list[int] = field(default_factory=list[int])
    mtp_blocks: list[int] = field(default_factory=list[int])
    children: dict[int, "Node"] = field(default_factory=dict[int, "Node"])
    snapshot: Snapshot | None = None

    @property
    def end(self) -> int:
        """Tokens up to the end of the run."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree knows of a prompt.

    Attributes:
        path: nodes from the root's child on; the last may be shared in part
        shared: tokens in common
        length: tokens that can be taken over
        node: whose snapshot that needs, or None
    """

    path: tuple[Node, ...]
    shared: int
    length: int
    node: Node | None


class PrefixCache:
    """What finished and running sequences left in a paged cache, for others to begin with.

    Args:
        pool: the cache; snapshots take slots of it
        recurrent: whether the model's layers have states
        lag: tokens by which the multi-token prediction may be behind
    """

    def __init__(self, pool: PagedCache, recurrent: bool, lag: int = 0) -> None:
        self.pool, self.recurrent, self.lag = pool, recurrent, lag
        self._roots: dict[str, Node] = {}
        # all nodes; and by kind those that have a snapshot, with the time of their last use; least recently used first
        self._used: dict[Node, None] = {}
        self._held: dict[Kind, dict[Node, int]] = {kind: {} for kind in KINDS}
        self._time, self._random = 0, random.Random(0)
        # by kind how many snapshots were used, and how many were used or went; those of long ago count less
        self._fates: dict[Kind, tuple[float, float]] = dict.fromkeys(KINDS, (0.0, 0.0))
        self._worths: dict[Kind, float] = dict.fromkeys(KINDS, 1 / UNKNOWN)

    def match(self, tokens: Sequence[int], limit: int, salt: str = "") -> Match:
        """The longest reusable part of `tokens`, at most `limit` of them."""
        node, path, at = self._root(salt), list[Node](), 0
        best: Node | None = None
        while (child := node.children.get(tokens[at]) if at < len(tokens) else None) is not None:
            run = child.tokens
            same = _common(run, tokens, at)
            at += same
            path.append(child)
            if same < len(run):
                break
            node = child
            if child.snapshot is not None and child.end <= limit:
                best = child
        if not self.recurrent:
            return Match(tuple(path), at, min(at, limit), None)
        return Match(tuple(path), at, 0 if best is None else best.end, best)

    def begin(self, slot: int, match: Match) -> tuple[tuple[int, ...], Tensor | None]:
        """Let an empty slot begin with what was matched; returns `tokens` and `hidden` of the snapshot that was read."""
        if not match.length:
            return (), None
        self._touch(next(node for node in reversed(match.path) if node.start < match.length))
        snapshot = None if match.node is None else match.node.snapshot
        lag = 0 if snapshot is None or snapshot.hidden is None else len(snapshot.hidden)
        # allocation of a partial block may need room
        pool, mtp = self.pool, self.pool.mtp
        if mtp is not None and lag:
            mtp.adopt(slot, _blocks(match, lambda n: (self._mtp_first(n.start), n.mtp_blocks)), match.length - lag)
        pool.adopt(slot, _blocks(match, lambda n: (n.start // BLOCK, n.blocks)), match.length)
        if snapshot is None:
            return (), None
        pool.copy_states(snapshot.slot, slot)
        self._note(snapshot.kind, 1)
        assert match.node is not None, "it has the snapshot"
        del self._held[snapshot.kind][match.node]
        snapshot.kind = "used"
        self.keep(match.node, snapshot)
        return snapshot.tokens, snapshot.hidden

    def insert(self, tokens: Sequence[int], slot: int, salt: str = "", with_mtp: bool = False) -> Node:
        """The node that ends with `tokens`, all of which the slot holds; blocks that are new to the tree are held."""
        node, at = self._root(salt), 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            same = _common(child.tokens, tokens, at)
            at += same
            node = child if same == len(child.tokens) else self._split(child, same)
        if at < len(tokens):
            leaf = Node(at, tuple(tokens[at:]), node, self.pool.hold(slot, at // BLOCK))
            if with_mtp and self.pool.mtp is not None:
                leaf.mtp_blocks = self.pool.mtp.hold(slot, self._mtp_first(at))
            node.children[tokens[at]] = leaf
            node = leaf
        self._touch(node)
        return node

    def keep(self, node: Node, snapshot: Snapshot) -> None:
        """Enter the state after a node's last token."""
        node.snapshot = snapshot
        self._time += 1
        self._held[snapshot.kind][node] = self._time

    def evict_blocks(self, wanted: Sequence[int]) -> None:
        """Free blocks until so many are free, of the pool and, where it drafts, of its multi-token prediction's, or nothing is
        left: least recently used leaves first."""
        pools = [self.pool] if self.pool.mtp is None else [self.pool, self.pool.mtp]
        while any(pool.blocks_free < count for pool, count in zip(pools, wanted, strict=False)):
            leaf = next((node for node in self._used if not node.children), None)
            if leaf is None:
                return
            self._remove(leaf)

    @property
    def snapshots(self) -> int:
        """Snapshots that are held."""
        return sum(map(len, self._held.values()))

    def evict_slot(self) -> bool:
        """Free the slot of one snapshot; False: there is none.

        Those on the way go first. Of each other kind the least recently used may go: that which waits longest for its worth,
        which is the share of its kind that was used so far. A conversation leaves three states a turn, of which its template
        lets the next turn use one: so the other two make room, and conversations that take turns do not lose all of theirs.
        """
        if self._held["way"]:
            node = next(iter(self._held["way"]))
        else:
            kinds: list[Kind] = [kind for kind in KINDS if self._held[kind]]
            if not kinds:
                return False
            # always the oldest: each might go just before it is wanted, and none would ever show what it is worth
            is_newest = max(self._worths.values()) < LITTLE and self._random.random() < NEWEST
            ends = [next((reversed if is_newest else iter)(self._held[kind].items())) for kind in kinds]
            ages = [(self._time - at + 1) / self._worths[kind] for kind, (_, at) in zip(kinds, ends, strict=True)]
            node = ends[ages.index((min if is_newest else max)(ages))][0]
        assert node.snapshot is not None, "it is held for its snapshot"
        self._note(node.snapshot.kind, 0)
        self.forget(node)
        return True

    def forget(self, node: Node) -> None:
        """Drop a node's snapshot, and the node with it if nothing else needs its keys."""
        self._drop_snapshot(node)
        # keys behind the last snapshot of a path cannot be used any more
        while self.recurrent and node.parent is not None and not node.children and node.snapshot is None:
            parent = node.parent
            self._remove(node)
            node = parent

    def clear(self) -> None:
        """Forget everything."""
        for node in list(self._used):
            self._drop(node)
        self._roots = {}

    def _note(self, kind: Kind, use: int) -> None:
        """One of a kind was used, or goes."""
        used, all_ = self._fates[kind]
        self._fates[kind] = used, all_ = FADE * used + use, FADE * all_ + 1
        self._worths[kind] = (used + 1) / (all_ + UNKNOWN)

    def _mtp_first(self, start: int) -> int:
        """Index of the first block that a node holds of multi-token prediction, which was behind when the node was made."""
        return max(0, start - self.lag) // BLOCK

    def _root(self, salt: str) -> Node:
        return self._roots.setdefault(salt, Node(0, (), None))

    def _touch(self, node: Node) -> None:
        """It was used now."""
        self._used[node] = self._used.pop(node, None)
        if node.snapshot is not None:
            del self._held[node.snapshot.kind][node]
            self.keep(node, node.snapshot)

    def _split(self, node: Node, size: int) -> Node:
        """Cut a run after `size` tokens; returns the upper part."""
        middle = node.start + size
        parent = node.parent
        assert parent is not None, "a root has no run"
        upper = Node(node.start, node.tokens[:size], parent)
        self._touch(upper)
        pools = [(self.pool, node.start // BLOCK, middle // BLOCK, node.blocks, upper.blocks)]
        if self.pool.mtp is not None:
            ends = self._mtp_first(node.start), self._mtp_first(middle)
            pools.append((self.pool.mtp, *ends, node.mtp_blocks, upper.mtp_blocks))
        for pool, first, second, below, above in pools:
            # a block in the middle is held by both
            above += below[: blocks_of(middle) - first]
            pool.add_holder(above)
            pool.drop(below[: second - first])
            del below[: second - first]
        node.start, node.tokens, node.parent = middle, node.tokens[size:], upper
        upper.children[node.tokens[0]] = node
        parent.children[upper.tokens[0]] = upper
        return upper

    def _remove(self, node: Node) -> None:
        """Take a leaf out."""
        self._drop(node)
        if node.parent is not None:
            del node.parent.children[node.tokens[0]]

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            del self._held[node.snapshot.kind][node]
            self.pool.close([node.snapshot.slot])
        node.snapshot = None

    def _drop(self, node: Node) -> None:
        self._drop_snapshot(node)
        del self._used[node]
        self.pool.drop(node.blocks)
        if self.pool.mtp is not None:
            self.pool.mtp.drop(node.mtp_blocks)
        node.blocks, node.mtp_blocks = [], []


def _common(run: Sequence[int], tokens: Sequence[int], at: int) -> int:
    """How many tokens of a run follow at `at`."""
    there = tuple(tokens[at : at + len(run)])
    if there == tuple(run):
        return len(run)
    return next((i for i, (a, b) in enumerate(zip(run, there, strict=False)) if a != b), min(len(run), len(there)))


def _blocks(match: Match, part: Callable[[Node], tuple[int, list[int]]]) -> list[int]:
    """The blocks of what was matched, by each node's first and its own: where two share one, the deeper holds what both need."""
    blocks: dict[int, int] = {}
    for first, own in (part(node) for node in match.path if node.start < match.length):
        blocks.update(enumerate(own, first))
    return [blocks[i] for i in sorted(blocks)]
