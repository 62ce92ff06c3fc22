"""What the next step computes: every decoding sequence's next row, then prompts, in order, in chunks that fill the step's budgets.

    waiting --(blocks for all its rows so far)--> running --(its last token)--> gone
       ^------------(no block left: the last in order gives its blocks up, and is computed again)-------------'

Nobody overtakes: where the first in the queue does not fit, those behind it wait. The first of the running sequences is never preempted
and fits into the cache alone, so that something always comes to an end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from llava_fast.engine.blocks import BlockPool, Content
from llava_fast.engine.features import FeatureCache
from llava_fast.engine.sequence import Picture, Sequence

_order = attrgetter("order")


@dataclass(eq=False)
class Work:
    """Rows first : last of a sequence. samples: the last of them gives the next token. draft: guesses for the tokens after it."""

    sequence: Sequence
    first: int
    last: int
    samples: bool
    draft: list[int] = field(default_factory=list)

    @property
    def repeats(self) -> bool:
        """Whether it is one row of an answer, as in the step before and after."""
        return self.first >= len(self.sequence.prompt) and self.samples and self.last - self.first == 1 and not self.draft


@dataclass
class Plan:
    """One step. pictures: those that it reads.  encode: of them, what the tower has to look at, each content once."""

    works: list[Work] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    encode: list[Picture] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(work.last - work.first + len(work.draft) for work in self.works)


class Scheduler:
    """max_rows, max_views: a step's budgets; a picture of more views than that has a step's views to itself. max_mixed_rows: where
    sequences decode, rows of prompts in that step, and one view, if fewer than max_rows.  max_running: sequences at a time, at most
    max_rows.  copy_rows(block, into, n): called to copy the keys and values of a block's first rows, at once."""

    def __init__(
        self,
        pool: BlockPool,
        features: FeatureCache,
        page: int,
        max_rows: int,
        max_views: int,
        max_mixed_rows: int,
        max_running: int,
        copy_rows: Callable[[int, int, int], None],
    ):
        self.pool, self.features, self.page, self.copy_rows = pool, features, page, copy_rows
        self.max_rows, self.max_views, self.max_running = max_rows, max_views, min(max_running, max_rows)
        self.max_mixed_rows = max_mixed_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.reused_rows = self.looked_up_rows = 0
        self._rows = self._views = self._step_views = 0  # what is left of the step's budgets, and its views to begin with
        self._slots = list(range(self.max_running - 1, -1, -1))

    def blocks_for(self, rows: int) -> int:
        return -(-rows // self.page)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def drop(self, sequence: Sequence) -> None:
        """It is over, whatever its state."""
        if sequence.slot >= 0:
            self._give_up(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self, guess: Callable[[Sequence, int], list[int]] | None = None) -> Plan:
        """guess(sequence, at most): tokens that may follow. The step counts as computed from here on: see `undo`."""
        plan = Plan()
        self._rows, self._views = self.max_rows, self.max_views
        for sequence in [s for s in self.running if s.decoding]:
            if sequence.slot >= 0 and sequence.produced < sequence.max_new and self._grow(sequence, sequence.length):
                self._put(plan, sequence)
        if guess is not None:  # from what all the decoding sequences leave
            for work in plan.works:
                work.draft = self._guess(work.sequence, guess)
        if plan.works and self.max_mixed_rows < self.max_rows:  # their tokens wait for what else the step computes
            self._rows, self._views = min(self._rows, self.max_mixed_rows), 1
        self._step_views = self._views
        for sequence in [s for s in self.running if not s.decoding]:
            self._put(plan, sequence)
        while self._rows and self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self._put(plan, sequence)
        return plan

    def undo(self, plan: Plan) -> None:
        """Take back a plan that was not carried out."""
        for work in plan.works:
            work.sequence.computed = min(work.sequence.computed, work.first)
            work.sequence.pending -= work.samples

    def redo(self, work: Work) -> None:
        """Count one of its works as computed again."""
        work.sequence.computed = work.last
        work.sequence.pending += work.samples

    def _put(self, plan: Plan, sequence: Sequence) -> None:
        first, last = sequence.computed, min(sequence.length, sequence.computed + self._rows)
        last = self._see(plan, sequence, first, last)
        if last <= first:
            return
        self._rows -= last - first
        work = Work(sequence, first, last, samples=last == sequence.length)
        sequence.computed = last
        sequence.pending += work.samples
        plan.works.append(work)

    def _guess(self, sequence: Sequence, guess: Callable[[Sequence, int], list[int]]) -> list[int]:
        """As many as the step, the answer and the blocks at hand have room for. The token before them is on its way."""
        rows = sequence.length - 1
        room = (len(sequence.blocks) + self.pool.available) * self.page - rows
        draft = guess(sequence, max(min(self._rows, sequence.max_new - sequence.produced, room), 0))
        while len(sequence.blocks) < self.blocks_for(rows + len(draft)):
            sequence.blocks.append(self.pool.take())
        self._rows -= len(draft)
        return draft

    def _see(self, plan: Plan, sequence: Sequence, first: int, last: int) -> int:
        """Find the rows of the pictures in first : last, or have them made; returns where the chunk ends if not all can be this step."""
        for picture in sequence.prompt.pictures:
            if picture.first >= last or picture.first + picture.tokens <= first:
                continue
            if picture.rows is None:
                picture.rows = self.features.get(picture.key)
            if picture.rows is not None or any(other.key == picture.key for other in plan.encode):
                plan.pictures.append(picture)
                continue
            if picture.cost > self._views and self._views < self._step_views:
                return max(picture.first, first)
            self._views -= picture.cost
            plan.pictures.append(picture)
            plan.encode.append(picture)
        return last

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first in the queue blocks for all its rows, those with its content where there are any."""
        if sequence.pending:  # preempted, with a token still on its way
            return False
        found: list[int] = []
        for block in range((sequence.length - 1) // self.page):  # one row at least is computed: its output is needed
            held = self.pool.find(sequence.key(block, self.page))
            if held is None:
                break
            found.append(held)
        whole = len(found) * self.page
        rest = sequence.rows(whole, min(whole + self.page, sequence.length - 1))
        like = self.pool.find_rows(sequence.key(len(found) - 1, self.page), rest)
        missing = self.blocks_for(sequence.length) - len(found)
        if like is not None and missing > self.pool.available:  # its block is needed for something else
            self.pool.release([like[0]])
            like = None
        if missing > self.pool.available:
            self.pool.release(reversed(found))
            return False
        self.waiting.remove(sequence)
        sequence.blocks = found + [self.pool.take() for _ in range(missing)]
        sequence.computed, sequence.published = whole, len(found)
        if like is not None:
            block, rows = like
            self.copy_rows(block, sequence.blocks[len(found)], rows)
            sequence.computed += rows
            self.pool.release([block])
        sequence.slot = self._slots.pop()
        self.looked_up_rows += sequence.length
        self.reused_rows += sequence.computed
        insort(self.running, sequence, key=_order)
        return True

    def _grow(self, sequence: Sequence, rows: int) -> bool:
        """Blocks for its next row, if need be those of the last in order; False where that is itself."""
        while len(sequence.blocks) < self.blocks_for(rows):
            if self.pool.available:
                sequence.blocks.append(self.pool.take())
                continue
            last = self.running[-1]
            self._give_up(last)
            self.preemptions += 1
            self.add(last)
            if last is sequence:
                return False
        return True

    def _give_up(self, sequence: Sequence) -> None:
        self.publish(sequence, tail=True)
        self.running.remove(sequence)
        self.pool.release(reversed(sequence.blocks))
        self._slots.append(sequence.slot)
        sequence.blocks, sequence.slot, sequence.computed = [], -1, 0

    def publish(self, sequence: Sequence, tail: bool = False) -> None:
        """Make the blocks findable that are full of known rows; with `tail`, also the one that is not full yet."""
        known = min(sequence.computed, len(sequence.prompt) + len(sequence.tokens))
        full = known // self.page
        for block in range(sequence.published, full + (tail and known % self.page > 0)):
            rows = sequence.rows(block * self.page, min((block + 1) * self.page, known))
            key = sequence.key(block, self.page) if block < full else None
            self.pool.publish(sequence.blocks[block], Content(key, sequence.key(block - 1, self.page), rows))
        sequence.published = max(sequence.published, full)
