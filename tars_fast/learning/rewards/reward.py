"""One reward of a run, and how its function is called. Shapes: N completions."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tars_fast.learning.rewards.inputs import Needs, RewardFunction, RewardInput
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import Modality, TrainingError

_LARGEST = torch.finfo(torch.float32).max
_PATIENCE = 5
"""Seconds for calls to end once they are cancelled."""
_INTERVAL = 0.5
"""Seconds between looks at whether calls that are waited for have outlasted their timeout."""


class RewardError(TrainingError):
    """A reward function failed; the message names it, the item, the completion and the value."""


@dataclass(frozen=True)
class Reward:
    """A function that rewards completions, and how much it counts."""

    name: str
    """What messages and metrics call it."""
    function: RewardFunction
    """See `asks_for` for what it may need."""
    weight: float = 1.0
    """Of it in R; 0: it is logged, and is no part of R."""
    is_early: bool = False
    """It looks at each completion by itself, and is called for those of a prompt while others are sampled."""

    @property
    def is_async(self) -> bool:
        function: Any = self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    @property
    def needs(self) -> Needs:
        found = getattr(self.function, "needs", None)
        return found if isinstance(found, Needs) else Needs()

    @property
    def in_background(self) -> bool:
        """Whether it is computed while the forward pass runs."""
        return self.is_async or self.needs.background

    @property
    def is_late(self) -> bool:
        """Whether its values are not known before the forward pass."""
        return self.in_background or bool(self.needs.layers)


def known_before(reward: Reward, inputs: Sequence[RewardInput]) -> tuple[Tensor, list[int]]:
    """([N] values that follow from which completions have a reference, else NaN; places of those to call the function for)."""
    if not reward.needs.reference:
        return torch.full((len(inputs),), torch.nan), list(range(len(inputs)))
    without = {Modality.SPEECH: 0.0, Modality.TEXT: math.nan}
    values_N = torch.tensor([math.nan if one.reference is not None else without[one.modality] for one in inputs])
    return values_N, [place for place, one in enumerate(inputs) if one.reference is not None]


def reward_values(reward: Reward, inputs: Sequence[RewardInput]) -> Tensor:
    """[N] fp32 what the function gives, which is not async; NaN where it does not apply.

    Raises:
        RewardError: it raised something, or gave other than one finite number, or None, a completion.
    """
    values_N, places = known_before(reward, inputs)
    asked = [inputs[place] for place in places]
    if asked:
        with _explained(reward, asked):
            values_N[places] = _checked(reward, asked, reward.function(list(asked)))
    return values_N


@contextmanager
def _explained(reward: Reward, asked: Sequence[RewardInput]) -> Iterator[None]:
    try:
        yield
    except TrainingError:
        raise
    # `sys.exit` too, which would end the run without a word.
    except (Exception, SystemExit) as error:
        # Elsewhere, where a judge runs, memory is not ours.
        if not reward.is_async and is_out_of_memory(error):
            raise
        one = asked[0] if len(asked) == 1 or reward.is_async else _culprit(reward, asked)
        if one is None:
            raise RewardError(f"reward {reward.name!r} raised {error!r:.200} for {len(asked)} completions together") from error
        raise RewardError(
            f"reward {reward.name!r} raised {error!r:.200} for a completion of item {one.question.id!r}: {one.text!r:.200}"
        ) from error


def _culprit(reward: Reward, asked: Sequence[RewardInput]) -> RewardInput | None:
    """The first completion that the function also fails for when it is alone."""
    for one in asked:
        try:
            reward.function([one])
        except (Exception, SystemExit):
            return one
    return None


def _checked(reward: Reward, asked: Sequence[RewardInput], returned: Any) -> Tensor:
    """[N] what a function returned."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple) or len(values) != len(asked):
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"{values!r:.100}"
        raise RewardError(
            f"reward {reward.name!r} gave {given} for {len(asked)} completions, the first of item {asked[0].question.id!r}; "
            "return a list with a number, or None, for each"
        )
    for one, value in zip(asked, values, strict=True):
        if value is None:
            continue
        if _as_float(value) is None:
            raise RewardError(
                f"reward {reward.name!r} is {value!r:.100} for a completion of item {one.question.id!r}: {one.text!r:.200}; "
                "give a finite number, or None"
            )
    return torch.tensor([math.nan if (number := _as_float(value)) is None else number for value in values])


def _as_float(value: Any) -> float | None:
    """A number that fp32 has; None for anything else. A bool counts as a number, a text does not."""
    number: Any = value.item() if getattr(value, "ndim", None) == 0 else value
    is_real = isinstance(number, Real)
    # Comparisons of whole numbers have no bound, and none with NaN is true.
    return float(number) if is_real and -_LARGEST <= number <= _LARGEST else None


@dataclass(frozen=True)
class LateValues:
    """[N] rewards that may still be computed."""

    parts: Sequence[Future[Tensor]]
    """One future of all, or one [1] of each completion."""
    result: Callable[[Future[Tensor]], Tensor] = Future.result
    """Waits for one of them."""

    def of(self, rows: Sequence[int]) -> Tensor:
        """Block until those of these completions are known. Raises what computing them raised."""
        if len(self.parts) == 1:
            return self.result(self.parts[0])[list(rows)]
        return torch.cat([self.result(self.parts[row]) for row in rows])

    def __reduce__(self) -> Any:
        # A future cannot be sent to another process; its result can.
        return completed, (torch.cat([self.result(part) for part in self.parts]),)


def completed(values_N: Tensor) -> LateValues:
    """Values that are there already."""
    future: Future[Tensor] = Future()
    future.set_result(values_N)
    return LateValues([future])


class AsyncCalls:
    """Calls async functions for one completion each, in a thread with an event loop that lasts as long as a run.

    Args:
        concurrency: calls that are under way at the same time, of all functions.
        timeout: seconds that a call may take.
    """

    def __init__(self, concurrency: int, timeout: float):
        self._concurrency, self._timeout = concurrency, timeout
        self._free = asyncio.Semaphore(concurrency)
        self._running: dict[asyncio.Task[Any], tuple[Reward, RewardInput, float]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, reward: Reward, inputs: Sequence[RewardInput], order: Sequence[int] = ()) -> LateValues:
        """The values of an async function, in the order of `inputs`, whichever call ends first.

        Args:
            order: places of `inputs`, in which calls begin; empty: as they stand.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # Of `asyncio.to_thread`, which else has as few threads as there are cores.
            self._executor = ThreadPoolExecutor(self._concurrency, "reward")
            self._loop.set_default_executor(self._executor)
            self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
            self._thread.start()
        values_N, places = known_before(reward, inputs)
        parts: list[Future[Tensor]] = [completed(value[None]).parts[0] for value in values_N]
        asked = set(places)
        for place in (place for place in order or places if place in asked):
            parts[place] = asyncio.run_coroutine_threadsafe(self._call(reward, inputs[place]), self._loop)
        return LateValues(parts, self._result)

    async def _call(self, reward: Reward, one: RewardInput) -> Tensor:
        function: Any = reward.function
        task = asyncio.current_task()
        assert task is not None, "run_coroutine_threadsafe makes one"
        async with self._free:
            self._running[task] = (reward, one, time.monotonic())
            try:
                async with asyncio.timeout(self._timeout):
                    with _explained(reward, [one]):
                        return _checked(reward, [one], await function([one]))
            except TimeoutError as error:
                raise RewardError(
                    f"reward {reward.name!r} took longer than --reward-timeout {self._timeout:g} s for a completion of item "
                    f"{one.question.id!r}: {one.text!r:.200}"
                ) from error
            finally:
                del self._running[task]

    def _result(self, part: Future[Tensor]) -> Tensor:
        """Wait for a call, however many are before it, but for none that does not end when its time is over."""
        while not wait([part], _INTERVAL).done:
            self._check_running()
        return part.result()

    def _check_running(self) -> None:
        # One that blocks the thread keeps the others from being cancelled too.
        blocking = asyncio.current_task(self._loop)
        for task in list(self._running) if blocking is None else [blocking]:
            call = self._running.get(task)
            if call is None or time.monotonic() < call[2] + self._timeout + _PATIENCE:
                continue
            reward, one, _ = call
            raise RewardError(
                f"reward {reward.name!r} does not stop after --reward-timeout {self._timeout:g} s for a completion of item "
                f"{one.question.id!r}: an async function must await what takes long, by asyncio.to_thread where it blocks"
            )

    def close(self) -> None:
        """Stop what is under way, and end the thread."""
        if self._loop is None:
            return
        # A function that blocks its thread, against the rules of async ones, is left to end with the process.
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(_PATIENCE)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop = None
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
