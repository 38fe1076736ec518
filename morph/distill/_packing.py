"""Whole documents put into rows: what goes where, as numbers, without any token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPEN = 64  # rows that may still be filled; the oldest is closed for a new one


def cut(
    starts: np.ndarray, total: int, row: int, bos: np.ndarray | None, eos: np.ndarray | None
) -> np.ndarray:
    """Cut documents into pieces of at most `row` tokens: `[P, 4]` start, count, bos, eos.

    A document's tokens run from its start to the next one's, or to `total`. `bos` and `eos` `[D]`
    say which documents want that token; None: none does. Every piece but a document's first gets
    the former, its last one the latter. A piece that would hold nothing else is left out.
    """
    counts = np.diff(np.append(starts, total))
    head = np.zeros(len(starts), dtype=np.int64) if bos is None else bos.astype(np.int64)
    tail = np.zeros(len(starts), dtype=np.int64) if eos is None else eos.astype(np.int64)
    first, other = row - head, row - (bos is not None)  # tokens that fit into a piece
    payload = counts + tail
    pieces = 1 + np.maximum(0, -(-(payload - first) // other))
    document = np.repeat(np.arange(len(starts)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.where(nth == 0, 0, first[document] + (nth - 1) * other)
    room = np.where(nth == 0, first[document], other)
    end = np.minimum(begin + room, payload[document])
    count = np.minimum(end, counts[document]) - begin
    table: np.ndarray = np.stack(
        [
            starts[document] + begin,
            count,
            np.where(nth == 0, head[document], int(bos is not None)),
            (end > counts[document]).astype(np.int64),
        ],
        axis=1,
    )
    kept: np.ndarray = table[count > 0]
    return kept


def pack(lengths: np.ndarray, order: Sequence[int], row: int) -> list[list[int]]:
    """Put pieces into rows of `row` tokens, in this order, each into the first row it fits.

    Of the rows that have room, the last 64 begun are looked at.
    """
    smallest = int(lengths.min())
    done: list[list[int]] = []
    members: list[list[int]] = []
    rooms: list[int] = []
    sizes = lengths.tolist()
    for piece in order:
        size = sizes[piece]
        place = 0
        for room in rooms:
            if room >= size:
                break
            place += 1
        else:
            if len(rooms) == OPEN:
                rooms.pop(0)
                done.append(members.pop(0))
                place -= 1
            rooms.append(row)
            members.append([])
        members[place].append(piece)
        rooms[place] -= size
        if rooms[place] < smallest:
            rooms.pop(place)
            done.append(members.pop(place))
    return done + members


class Epochs:
    """The rows of epoch after epoch, each a pure function of seed and epoch.

    An epoch puts every piece into one row. How many rows that makes differs, so where an epoch
    begins is known once those before it have been packed; two epochs are held at a time.
    """

    def __init__(self, lengths: np.ndarray, row: int, seed: int) -> None:
        self.lengths, self.row, self.seed = lengths, row, seed
        self.ends: list[int] = []  # the number of rows up to the end of each epoch
        self.held: dict[int, list[list[int]]] = {}

    def pieces(self, number: int) -> list[int]:
        """Return the pieces of the row `number`, counted from the beginning of the stage."""
        while not self.ends or number >= self.ends[-1]:
            rows = len(self.rows(len(self.ends)))
            self.ends.append(rows + (self.ends[-1] if self.ends else 0))
        epoch = int(np.searchsorted(self.ends, number, side="right"))
        before = self.ends[epoch - 1] if epoch else 0
        return self.rows(epoch)[number - before]

    def rows(self, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch."""
        if epoch not in self.held:
            rng = np.random.default_rng([self.seed, epoch])
            packed = pack(self.lengths, rng.permutation(len(self.lengths)).tolist(), self.row)
            # Rows that fill early hold more of the short pieces: hence an order of their own
            if len(self.held) > 1:
                del self.held[next(iter(self.held))]
            self.held[epoch] = [packed[i] for i in rng.permutation(len(packed)).tolist()]
        return self.held[epoch]
