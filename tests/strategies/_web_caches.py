"""Plain caches of single requests, written from the papers' pseudocode."""

from fractions import Fraction


class PlainSieve:
    """SIEVE with a list, the oldest first; the hand is an object, None for the oldest."""

    def __init__(self, slots: int):
        self.slots, self.queue, self.visited, self.hand = slots, [], set(), None

    def members(self) -> set[int]:
        return set(self.queue)

    def request(self, expert: int) -> None:
        if expert in self.queue:
            self.visited.add(expert)
            return
        if len(self.queue) >= self.slots:
            self._evict()
        self.queue.append(expert)

    def _evict(self) -> None:
        at = 0 if self.hand is None else self.queue.index(self.hand)
        while self.queue[at] in self.visited:
            self.visited.discard(self.queue[at])
            at = (at + 1) % len(self.queue)
        self.hand = self.queue[at + 1] if at + 1 < len(self.queue) else None
        self.queue.pop(at)


class PlainS3Fifo:
    """S3-FIFO with lists, the oldest first."""

    def __init__(self, slots: int):
        self.slots, self.num_small = slots, max(1, slots // 10)
        self.num_ghosts = slots * 9 // 10
        self.small, self.main, self.ghost, self.uses = [], [], [], {}
        self.has_evicted = False

    def members(self) -> set[int]:
        return {*self.small, *self.main}

    def request(self, expert: int) -> None:
        if expert in self.small or expert in self.main:
            self.uses[expert] += 1
            return
        was_ghost = expert in self.ghost
        if was_ghost:
            self.ghost.remove(expert)
        while len(self.small) + len(self.main) >= self.slots:
            self._evict()
        fills_up = not self.has_evicted and len(self.small) >= self.num_small
        (self.main if was_ghost or fills_up else self.small).append(expert)
        self.uses[expert] = 0

    def _evict(self) -> None:
        self.has_evicted = True
        if len(self.main) > self.slots - self.num_small or not self.small:
            while self.uses[self.main[0]] > 0:
                expert = self.main.pop(0)
                self.uses[expert] = min(self.uses[expert], 3) - 1
                self.main.append(expert)
            self.main.pop(0)
            return
        while self.small:
            expert = self.small.pop(0)
            if self.uses[expert] < 2:
                self.ghost = [*self.ghost, expert][-self.num_ghosts :] if self.num_ghosts else []
                return
            self.uses[expert] = 0
            self.main.append(expert)


class PlainArc:
    """ARC with lists, the least recent first, and a target of exact fractions."""

    def __init__(self, slots: int):
        self.slots, self.target = slots, Fraction(0)
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def members(self) -> set[int]:
        return {*self.t1, *self.t2}

    def request(self, expert: int) -> None:
        for hits in (self.t1, self.t2):
            if expert in hits:
                hits.remove(expert)
                self.t2.append(expert)
                return
        for ghosts, others, sign in ((self.b1, self.b2, 1), (self.b2, self.b1, -1)):
            if expert in ghosts:
                change = sign * max(Fraction(len(others), len(ghosts)), Fraction(1))
                self.target = min(max(self.target + change, Fraction(0)), Fraction(self.slots))
                ghosts.remove(expert)
                self._replace(was_in_b2=sign < 0)
                self.t2.append(expert)
                return
        if len(self.t1) + len(self.t2) >= self.slots:
            self._make_room()
        self.t1.append(expert)

    def _make_room(self) -> None:
        if len(self.t1) + len(self.b1) >= self.slots:
            if not self.b1:
                self.t1.pop(0)
                return
            self.b1.pop(0)
        elif len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) >= 2 * self.slots:
            self.b2.pop(0)
        self._replace(was_in_b2=False)

    def _replace(self, *, was_in_b2: bool) -> None:
        num_first = len(self.t1)
        if num_first and (num_first > self.target or (num_first == self.target and was_in_b2)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))


class PlainLeastStale:
    """Sets at a time: keeps who is demanded now, then who was loaded last."""

    def __init__(self, slots: int):
        self.slots, self.loaded, self.num_sets = slots, {}, 0

    def members(self) -> set[int]:
        return set(self.loaded)

    def request_set(self, demanded: set[int]) -> None:
        self.num_sets += 1
        for expert in demanded - self.members():
            self.loaded[expert] = self.num_sets
        order = sorted(self.loaded, key=lambda e: (e not in demanded, -self.loaded[e], e))
        self.loaded = {expert: self.loaded[expert] for expert in order[: self.slots]}


PLAIN = {
    "sieve": PlainSieve,
    "s3fifo": PlainS3Fifo,
    "arc": PlainArc,
    "least_stale": PlainLeastStale,
}


def count_hits(name: str, sets: list[set[int]], slots: int) -> int:
    """Hits of a plain cache; a set's members are requested one by one, hits first, by id."""
    cache, num_hits = PLAIN[name](slots), 0
    for demanded in sets:
        inside = cache.members()
        num_hits += len(demanded & inside)
        if hasattr(cache, "request_set"):
            cache.request_set(demanded)
            continue
        for expert in sorted(demanded, key=lambda e: (e not in inside, e)):
            cache.request(expert)
    return num_hits
