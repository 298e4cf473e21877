"""Several processes share the requests of an evaluation, each of which is scored once.

Every process builds the same requests, takes its share, and scores it as a single process would; then all of them get
all scores. The choices of an item stay together, so that what they have in common is computed once.

Processes find each other as those of a training run do: started by torchrun (`aurora eval --processes N`, or one
`python -m pretrain.processes` per node).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lm_eval.api.instance import Instance

from eval.errors import TeamError
from eval.scoring import ContinuationScorer, Score, ScoreStore, request_key
from pretrain.engine.ranks import Ranks
from pretrain.processes.environment import world
from pretrain.processes.errors import PeerError, UserError
from pretrain.processes.failures import report

T = TypeVar("T")
Job = TypeVar("Job")

_FAILED = "aurora-eval-failed"
"""The key of the store under which the first process that fails says so."""
_GAVE_UP = "aurora-eval-gave-up"
"""The same for a process that cannot do its share of a piece of work; with the number of that piece."""
_LONGEST = timedelta(days=30)
"""How long a process waits for the shares of the others. One that has died is noticed by its closed connection."""
_REQUEST_COST = 16
"""Of a request besides its text, in characters."""


class SharedScorer(ContinuationScorer):
    """A scorer that leaves to the other processes what is theirs.

    Attributes:
        scored_by_rank: number of requests that each process has scored.
        reused_requests: number of requests whose score was in the store.

    Args:
        arguments: as for `ContinuationScorer`.
        team: the processes.
        store: where scores are looked up, and added after each batch.
        options: as for `ContinuationScorer`.
    """

    def __init__(self, *arguments: Any, team: Team, store: ScoreStore | None = None, **options: Any) -> None:
        super().__init__(*arguments, store=_Watched(store, team) if team.ranks.world_size > 1 else store, **options)
        self._team, self._ranks = team, team.ranks
        self._cache = store
        self.scored_by_rank = [0] * team.ranks.world_size
        self.reused_requests = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Return (log-likelihood, whether greedy decoding would produce it) for each request, on every rank.

        Raises:
            EvalError: the requests cannot be scored; of several processes, all raise a `TeamError`.
        """
        before = self.scored_requests
        if self._ranks.world_size == 1:
            results = super().loglikelihood(requests)
            self._count([self.scored_requests - before], len(requests))
            return results
        # Other processes may add scores meanwhile, so that one of them decides for all what is known.
        known = set(self._ranks.broadcast(self._known(requests)))
        mine = divide(requests, known, self._ranks.world_size)[self._ranks.rank]
        earlier = Counter(self.truncated_requests)

        def score() -> tuple[list[int], list[Score], Counter[str], int]:
            scores = super(SharedScorer, self).loglikelihood([requests[index] for index in mine])
            return mine, scores, self.truncated_requests - earlier, self.scored_requests - before

        shares = self._team.shared(score)
        self.truncated_requests = earlier
        found: dict[int, Score] = {}
        for indices, values, cut, _ in shares:
            found.update(zip(indices, values, strict=True))
            self.truncated_requests += cut
        self._count([scored for *_, scored in shares], len(requests))
        return [found[index] for index in range(len(requests))]

    def _known(self, requests: Sequence[Instance]) -> list[int]:
        """The indices of requests whose score is kept, according to rank 0."""
        if self._ranks.rank != 0 or self._cache is None:
            return []
        keys = [request_key(*request.args) for request in requests]
        known = self._cache.known(set(keys))
        return [index for index, key in enumerate(keys) if key in known]

    def _count(self, scored: Sequence[int], requests: int) -> None:
        self.scored_by_rank = [total + new for total, new in zip(self.scored_by_rank, scored, strict=True)]
        self.reused_requests += requests - sum(scored)


def divide(requests: Sequence[Instance], known: Collection[int], parts: int) -> list[list[int]]:
    """Divide requests into shares of about equal cost; return the indices of each share in ascending order.

    The requests of an item stay together. Items go to the cheapest share so far, the most expensive ones first. An
    item costs about as much as its text is long, counting what several of its requests begin with once.

    Args:
        requests: the same ones, in the same order, on every process.
        known: the indices of those that cost nothing.
        parts: number of shares.
    """
    items: dict[tuple[str | None, int | None], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        items[request.task_name, request.doc_id].append(index)
    priced = []
    for indices in items.values():
        texts = [requests[index].args for index in indices if index not in known]
        contexts = {context for context, _ in texts}
        priced.append((sum(map(len, contexts)) + sum(len(end) + _REQUEST_COST for _, end in texts), indices))
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [(0, part) for part in range(parts)]
    for cost, indices in sorted(priced, key=lambda item: (-item[0], item[1])):
        total, part = heapq.heappop(totals)
        shares[part] += indices
        heapq.heappush(totals, (total + cost, part))
    return [sorted(share) for share in shares]


class _GaveUpError(Exception):
    """Another process cannot do its share, so that this one need not finish its own."""


@dataclass
class Team:
    """The processes that share an evaluation, seen from one of them."""

    ranks: Ranks = field(default_factory=Ranks)
    store: dist.Store | None = None
    """Where a process that fails says so; None for a single process."""
    _pieces: int = 0
    """Number of pieces of work that were shared so far."""

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` returns here; bad input on one process is bad input on all of them.

        Args:
            work: must not communicate.

        Raises:
            UserError: a single process: what `work` raised.
            TeamError: on every one of several processes, if `work` raised a `UserError` on any.
            Exception: what else `work` raised here.
            PeerError: it raised that on another process.
        """
        if self.ranks.world_size == 1:
            return work()
        found: list[T] = []

        def attempt() -> tuple[str, str] | None:
            try:
                found.append(work())
            except UserError as error:
                return str(error), socket.gethostname()
            return None

        answers = self.ranks.together(attempt)
        problems = [(rank, *answer) for rank, answer in enumerate(answers) if answer is not None]
        if problems:
            rank, problem, host = problems[0]
            everywhere = len(problems) == len(answers) and len({text for _, text, _ in problems}) == 1
            raise TeamError(problem if everywhere else f"{problem} (on rank {rank}, host {host})")
        return found[0]

    def shared(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on each process, by rank, on every one of them.

        Args:
            work: this process's share, with a picklable value; must not communicate. If it raises an error on one
                process, the others stop at their next call of `check`.

        Raises:
            UserError, TeamError, Exception, PeerError: as for `together`.
        """
        if self.ranks.world_size == 1:
            return [work()]
        self._pieces += 1
        found: list[T] = []
        own: Exception | None = None
        try:
            found.append(work())
        except PeerError:
            raise  # that process has left, and takes part in nothing more
        except _GaveUpError:
            pass  # its error is raised below
        except Exception as error:
            self._say(f"{_GAVE_UP}-{self._pieces}", "")
            own = error

        def answer() -> None:
            if own is not None:
                raise own

        self.together(answer)
        return self.ranks.gather(found[0])

    def led(self, lead: Callable[[Callable[[Job], T]], object], work: Callable[[Job], T]) -> None:
        """Let the first process decide what all of them do, until it is done.

        Args:
            lead: called on the first process alone, with a function that has every process do `work`; it may take any
                time in between.
            work: done by every process, with the picklable value that the first one gives; may communicate. What bad
                input raises must be a `TeamError`, so that all continue.

        Raises:
            UserError: on every process, if `lead` raised it.
        """
        if self.ranks.world_size == 1:
            lead(work)
        elif self.ranks.rank == 0:
            problem = None
            try:
                lead(lambda job: work(self.ranks.broadcast([job])[0]))
            except UserError as error:
                problem = error
            self.ranks.broadcast(problem and str(problem))
            if problem is not None:
                raise problem
        else:
            while isinstance(job := self.ranks.broadcast(None), list):
                with contextlib.suppress(TeamError):  # the first process decides what follows from it
                    work(job[0])
            if job is not None:
                raise TeamError(job)

    def on_first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first process alone; its picklable result, on every process.

        Raises:
            UserError: as for `together`.
        """
        values: list[T] = []
        self.together(lambda: values.append(work()) if self.ranks.rank == 0 else None)
        value: T = self.ranks.broadcast(values[0] if values else None)
        return value

    def check(self) -> None:
        """Stop here if another process has failed, or has given up what is shared now.

        Raises:
            PeerError: one has failed.
        """
        if self.store is None:
            return
        if self.store.check([_FAILED]):
            raise PeerError(*json.loads(self.store.get(_FAILED)))
        if self.store.check([f"{_GAVE_UP}-{self._pieces}"]):
            raise _GaveUpError

    def fail(self, error: BaseException) -> None:
        """Report an error of this process, and tell the others, which then end at their next batch."""
        # Before this process leaves the group: the others then fail later than this one.
        code = report(error)
        if not isinstance(error, PeerError):
            text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self._say(_FAILED, json.dumps([self.ranks.rank, socket.gethostname(), text, code]))

    def _say(self, key: str, value: str) -> None:
        """Tell the other processes, which look for it in `check`."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
                self.store.set(key, value)


@contextlib.contextmanager
def joined_team() -> Iterator[Team]:
    """Yield this process among those that a launcher started with it."""
    if world().size == 1:
        yield Team()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_LONGEST)
    team = Team(Ranks(rank, size, dist.group.WORLD), store)
    try:
        yield team
    except BaseException as error:
        team.fail(error)
        raise
    finally:
        dist.destroy_process_group()


class _Watched:
    """A store that stops this process once another one has failed or given up."""

    def __init__(self, store: ScoreStore | None, team: Team) -> None:
        self._store, self._team = store, team

    def known(self, keys: Collection[str]) -> Mapping[str, Score]:
        return self._store.known(keys) if self._store else {}

    def add(self, scores: Mapping[str, Score]) -> None:
        if self._store:
            self._store.add(scores)
        self._team.check()
