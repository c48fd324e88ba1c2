"""Which episodes are played, and in which order slots take them.

A (task, trial) pair is one initial state. Training walks a shuffled list of all pairs (`ordered`),
draws them at random, or draws tasks by what they may teach (`informative`); evaluation visits every
pair once, interleaved over tasks. All depend on the configuration and the step only, and a
curriculum on the metrics of the steps before, never on ranks, so every rank computes the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from vlactl.api.contracts import Episode, Task
from vlactl.api.noise import generator, make_key
from vlactl.config.run import RolloutConfig
from vlactl.errors import ConfigError

Pair = tuple[int, int]

TASK_SUCCESS = "env/success_once/task_"
"""Followed by the index of a task: the metric with its mean success in a step of training."""


def select_pairs(
    tasks: Sequence[Task],
    wanted_tasks: Sequence[int] | None,
    wanted_trials: Sequence[int] | None,
    *,
    for_evaluation: bool = False,
) -> list[Pair]:
    """All (task, trial) pairs of the wanted tasks and trials, task by task.

    Args:
        tasks: of the environment.
        wanted_tasks: None = all.
        wanted_trials: None = all or, for an evaluation, those that a task keeps for it.
        for_evaluation: see `wanted_trials`.

    Raises:
        ConfigError: a task or a trial does not exist.
    """
    known = {task.index: task for task in tasks}
    chosen = list(known) if wanted_tasks is None else list(wanted_tasks)
    if missing := [index for index in chosen if index not in known]:
        raise ConfigError(
            f"there is no task {missing[0]}: this suite has {len(known)} tasks",
            hint=f"valid task indices: 0-{len(known) - 1}",
        )
    pairs: list[Pair] = []
    for index in chosen:
        num_trials = known[index].num_trials
        usual = known[index].eval_trials if for_evaluation else range(num_trials)
        trials = usual if wanted_trials is None else wanted_trials
        if too_high := [trial for trial in trials if trial >= num_trials]:
            raise ConfigError(
                f"task {index} has {num_trials} initial states, trial {too_high[0]} does not exist",
                hint=f"valid trials of this task: 0-{num_trials - 1}; a state is never used twice",
            )
        pairs.extend((index, trial) for trial in trials)
    return pairs


def ordered_draws(
    ids: Sequence[int], num_rows: int = 1, row: int = 0, per_draw: int = 1
) -> Iterator[list[int]]:
    """Walk shuffled ids for ever: one row of a table that `num_rows` workers share.

    With one row and one id per draw this is vlactl's own order. More rows reproduce the order of
    the reference, where each worker walks a row and skips what is left over before it shuffles
    again. The generator's seed is 0 by that convention: the order is the same in every run.
    """
    random = np.random.default_rng(0)
    while True:
        table = np.array(ids)
        random.shuffle(table)
        if len(table) < num_rows:
            table = np.tile(table, -(-num_rows // len(table)))
        walk = table[: len(table) // num_rows * num_rows].reshape(num_rows, -1)[row]
        for start in range(0, len(walk) - per_draw + 1, per_draw):
            yield walk[start : start + per_draw].tolist()


def random_draws(ids: Sequence[int], seed: int, per_draw: int = 1) -> Iterator[list[int]]:
    """Draw ids independently."""
    random = np.random.default_rng(seed)
    while True:
        yield [ids[i] for i in random.integers(0, len(ids), per_draw)]


class Curriculum:
    """Which tasks training draws, given how often each was solved of late.

    What a group can teach grows with the variance of its successes: p (1 - p), where p is the
    task's recent success, 1/2 before it was ever played ("learnability": Rutherford et al. 2024,
    arXiv:2408.15099). Of two tasks that teach nothing the failing one is drawn more often,
    (p + HOPE) (1 - p): it may only have lacked luck, and is what is left to learn. Tasks share
    `1 - EVEN_SHARE` of the groups in proportion to that, and the rest evenly.
    """

    EVEN_SHARE = 0.2
    HOPE = 0.1
    """A task that always fails is drawn about as often as one that succeeds nine times in ten."""
    RATE = 0.3
    """Of the moving average over the steps in which a task was played."""

    def __init__(self, tasks: Iterable[int]) -> None:
        self._success = dict.fromkeys(sorted(tasks), 0.5)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a step; steps have to come in their order."""
        for task, before in self._success.items():
            now = metrics.get(f"{TASK_SUCCESS}{task}", before)
            self._success[task] = before + self.RATE * (now - before)

    def shares(self) -> np.ndarray:
        """Of each task among the groups, by index: float64, with sum 1."""
        success = np.array(list(self._success.values()))
        teaches = (success + self.HOPE) * (1.0 - success)
        if teaches.sum() == 0.0:
            teaches = np.ones_like(teaches)
        even = self.EVEN_SHARE / len(success)
        shares: np.ndarray = even + (1.0 - self.EVEN_SHARE) * teaches / teaches.sum()
        return shares

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        """Tasks of so many groups: each as often as its share says, up to rounding by chance."""
        places = (random.random() + np.arange(count)) / count
        edges = np.cumsum(self.shares())[:-1]
        tasks = list(self._success)
        return [tasks[index] for index in np.searchsorted(edges, places, side="right")]


class TrainingEpisodes:
    """The episodes of every training step.

    Args:
        tasks: of the environment.
        config: of the rollout.
        group_size: episodes per group; they share task and trial.
        seed: of the run.
        start_step: first step that will be asked for (resume).
        history: metrics of the steps before that; only a curriculum wants to know.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: RolloutConfig,
        *,
        group_size: int,
        seed: int,
        start_step: int = 0,
        history: Iterable[Mapping[str, float]] = (),
    ) -> None:
        self._pairs = select_pairs(tasks, config.tasks, config.trials)
        self._group_size, self._seed = group_size, seed
        self._num_groups = config.episodes_per_step // group_size
        ids = range(len(self._pairs))
        self._draws = ordered_draws(ids) if config.order == "ordered" else random_draws(ids, seed)
        self._step = start_step - 1
        self._attempts: dict[int, tuple[int, ...]] = {}  # of groups replaced in this step
        self._curriculum = None
        if config.order == "informative":
            self._curriculum = Curriculum({task for task, _ in self._pairs})
        else:
            _skip(self._draws, start_step * self._num_groups)
        for metrics in history:
            self.observe(metrics)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of the step that was played last."""
        if self._curriculum is not None:
            self._curriculum.observe(metrics)

    def next_step(self) -> list[Episode]:
        """Episodes of the next step, ordered by (group, member)."""
        self._step += 1
        self._attempts.clear()
        if self._curriculum is None:
            pairs = [self._pairs[index] for (index,) in islice(self._draws, self._num_groups)]
        else:
            draw = generator("curriculum", self._seed, self._step)
            pairs = self._informative_pairs(self._curriculum, draw, self._num_groups)
        return [
            episode for group, pair in enumerate(pairs) for episode in self._group(group, *pair)
        ]

    def replacements(self, groups: Sequence[int], attempt: int) -> list[Episode]:
        """Other episodes for some groups of the current step.

        Their initial states are drawn at random: the walk over all states goes on as if nothing had
        been replaced, so that a resumed run finds its place.
        """
        episodes = []
        for group in groups:
            draw = generator("resample", self._seed, self._step, group, attempt)
            if self._curriculum is None:
                pair = self._pairs[draw.integers(len(self._pairs))]
            else:
                (pair,) = self._informative_pairs(self._curriculum, draw, 1)
            episodes += self._group(group, *pair, attempt)
            self._attempts[group] = (attempt,)
        return episodes

    def successor(self, episode: Episode) -> Episode:
        """What follows an episode in its lane: the same task from another random state."""
        trials = self._trials(episode.task)
        member = episode.member + 1
        key = self._attempts.get(episode.group, ())
        draw = generator("lane", self._seed, self._step, episode.group, member, *key)
        trial = trials[draw.integers(len(trials))]
        return self._episode(episode.task, trial, episode.group, member, *key)

    def _informative_pairs(
        self, curriculum: Curriculum, draw: np.random.Generator, count: int
    ) -> list[Pair]:
        """Pairs by the curriculum; a state comes again when all of its task have come."""
        pairs: list[Pair] = []
        for task, num_groups in sorted(Counter(curriculum.draw(draw, count)).items()):
            trials = draw.permutation(self._trials(task))
            pairs += [(task, int(trials[i % len(trials)])) for i in range(num_groups)]
        return pairs

    def _trials(self, task: int) -> list[int]:
        return [trial for of_task, trial in self._pairs if of_task == task]

    def _group(self, group: int, task: int, trial: int, *key: int) -> list[Episode]:
        members = range(self._group_size)
        return [self._episode(task, trial, group, member, *key) for member in members]

    def _episode(self, task: int, trial: int, group: int, member: int, *key: int) -> Episode:
        seed = make_key("train", self._seed, self._step, task, trial, group, member, *key)
        return Episode(task=task, trial=trial, group=group, member=member, seed=seed)


def evaluation_episodes(pairs: Sequence[Pair], *, passes: int, seed: int) -> list[Episode]:
    """Every pair once in each pass: trial 0 of all tasks, then trial 1, and so on."""
    interleaved = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    return [
        Episode(
            task=task,
            trial=trial,
            group=group,
            member=number,
            seed=make_key("eval", seed, task, trial, number),
        )
        for number in range(passes)
        for group, (task, trial) in enumerate(interleaved)
    ]


def share_of_rank(
    episodes: Sequence[Episode], rank: int, processes: Sequence[int]
) -> list[Episode]:
    """Whole groups for a rank, dealt round-robin.

    Args:
        episodes: of all ranks.
        rank: may have no share.
        processes: rank of each env process; one that is repeated has several shares.
    """
    return [e for e in episodes if processes[e.group % len(processes)] == rank]


def deal(episodes: Sequence[Episode], rank: int, processes: Sequence[int]) -> list[Episode]:
    """Single episodes for a rank, dealt round-robin; for what is compared with nothing.

    Args:
        episodes: of all ranks.
        rank: may have no share.
        processes: rank of each env process; one that is repeated has several shares.
    """
    return [
        episode
        for number, episode in enumerate(episodes)
        if processes[number % len(processes)] == rank
    ]


class EpisodeQueue:
    """Episodes that wait for a slot. A slot gets its last task again while there is work for it."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._waiting = list(episodes)

    def take(self, last_task: int | None, served: Sequence[int] = ()) -> Episode | None:
        """The next episode for a slot.

        Args:
            last_task: what the slot played last; restoring it is cheap, another task is a rebuild.
            served: tasks that other slots are at; a slot without work of its own takes another one.
        """
        if not self._waiting:
            return None
        preferences = (
            lambda episode: episode.task == last_task,
            lambda episode: episode.task not in served,
            lambda _: True,
        )
        for wanted in preferences:
            for position, episode in enumerate(self._waiting):
                if wanted(episode):
                    return self._waiting.pop(position)
        return None

    def put_back(self, episode: Episode) -> None:
        """Play this episode again, next."""
        self._waiting.insert(0, episode)

    def drop_group(self, group: int) -> None:
        """Forget the waiting members of a group."""
        self._waiting = [episode for episode in self._waiting if episode.group != group]


def _skip(draws: Iterator[list[int]], count: int) -> None:
    for _ in islice(draws, count):
        continue
