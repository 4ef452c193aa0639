"""How long processes wait for each other, with shares by number and by tokens: `python bench/balance.py --output FILE`.

Training: lengths of a step are drawn many times, shared out by the functions that training uses, and a process's time is taken
to go by its tokens, so that idle time is 1 - mean / largest. Sampling: with all completions in flight a process's time goes by
its longest one, whichever questions it has.

Mean and deviation of completions on MMSU are not published for the models here, so both are assumed: completions are log-normal
with a mean of 300 tokens and a deviation of half of that, cut off at 1024 (`--max-new-tokens`). Half of the variance of their
logarithms is the question's, because completions of one question are alike. Other deviations stand beside it. Recordings are
log-normal with a mean of 10 s and a deviation of 7 s, between 2 and 30 s, of 25 audio tokens a second; a prompt has 60 of text.

Then two processes on this machine: what an exchange costs, and the watchdog.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tars_fast.learning.balance import TOLERANCE, balancing_moves, even_shares
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.support.provenance import provenance
from tars_fast.support.timing import entered

MEAN, CUT_OFF, GROUP_SIZE = 300, 1024, 8
AUDIO_SECONDS, AUDIO_DEVIATION, AUDIO_TOKENS, TEXT_TOKENS = 10, 7, 25, 60
QUESTION_PART = 0.5
"""Of the variance of a completion's log-length."""
BYTES_PER_AUDIO_TOKEN = 3584 * 2
"""Embeddings at the width of Qwen2.5-Omni-7B, in bfloat16."""
NUM_RANKS = (8, 64, 512)
NUM_DRAWS = 20


def log_normal(mean: float, deviation: float) -> tuple[float, float]:
    """(mean, variance) of the logarithm."""
    variance = float(np.log1p((deviation / mean) ** 2))
    return float(np.log(mean)) - variance / 2, variance


def draw(rng: np.random.Generator, num_questions: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """([Q] audio tokens, [Q, G] tokens of completions) of a step."""
    mean, variance = log_normal(AUDIO_SECONDS, AUDIO_DEVIATION)
    seconds = np.exp(rng.normal(mean, variance**0.5, num_questions)).clip(2, 30)
    mean, variance = log_normal(MEAN, deviation * MEAN)
    of_question = rng.normal(mean, (variance * QUESTION_PART) ** 0.5, num_questions)
    of_completion = rng.normal(0, (variance * (1 - QUESTION_PART)) ** 0.5, (num_questions, GROUP_SIZE))
    lengths = np.exp(of_question[:, None] + of_completion).clip(1, CUT_OFF)
    return (seconds * AUDIO_TOKENS).astype(int), lengths.astype(int)


def idle(loads: list[int]) -> float:
    """Mean share of a step that a process waits for the slowest."""
    return 1 - statistics.fmean(loads) / max(loads)


def simulate(num_ranks: int, per_rank: int, deviation: float) -> dict[str, float]:
    """Means over draws."""
    rng = np.random.default_rng([num_ranks, per_rank])
    found: list[dict[str, float]] = []
    for _ in range(NUM_DRAWS):
        audio, lengths = draw(rng, num_ranks * per_rank, deviation)
        prompts = audio + 2 * TEXT_TOKENS
        tokens = prompts + lengths.sum(1)
        places = {
            "by number": [list(range(rank, len(tokens), num_ranks)) for rank in range(num_ranks)],
            "by prompt tokens": even_shares((audio + TEXT_TOKENS).tolist(), num_ranks),
        }
        shares = {name: [[int(tokens[place]) for place in share] for share in shared] for name, shared in places.items()}
        sampled = places["by prompt tokens"]
        started = time.perf_counter()
        moves = balancing_moves(shares["by prompt tokens"])
        seconds = time.perf_counter() - started
        exchanged = [sum(share) for share in shares["by prompt tokens"]]
        for move in moves:
            count = shares["by prompt tokens"][move.source][move.place]
            exchanged[move.source] -= count
            exchanged[move.target] += count
        moved = [int(audio[sampled[move.source][move.place]]) * BYTES_PER_AUDIO_TOKEN for move in moves]
        found.append(
            {f"idle {name}": idle([sum(share) for share in shared]) for name, shared in shares.items()}
            | {
                "idle exchanged": idle(exchanged),
                "idle at best": 1 - tokens.mean() * per_rank / max(tokens.max(), tokens.mean() * per_rank),
                "idle of prompts by number": idle([int(prompts[share].sum()) for share in places["by number"]]),
                "idle of prompts by tokens": idle([int(prompts[share].sum()) for share in sampled]),
                "idle of sampling": idle([int(lengths[share].max()) for share in sampled]),
                "part of questions moved": len(moves) / len(tokens),
                "megabytes moved a process": sum(moved) / num_ranks / 1e6,
                "milliseconds to find moves": 1000 * seconds,
            }
        )
    return {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}


def median_microseconds(call, number: int) -> float:
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(seconds), 1)


def measure_pair(workers: Workers) -> dict[str, float]:
    """Costs between two processes; the same numbers of calls in both."""
    without = Workers(workers.rank, workers.size)
    watchdog = workers.watchdog
    assert watchdog is not None

    def enter() -> None:
        with watchdog.waiting("bench"):
            pass

    def phase() -> None:
        with entered("bench"):
            pass

    found = {"gather, microseconds": median_microseconds(lambda: without.gather(1.0), 1000)}
    found["gather watched, microseconds"] = median_microseconds(lambda: workers.gather(1.0), 1000)
    found["watching a call, microseconds"] = median_microseconds(enter, 10_000)
    found["entering a phase, microseconds"] = median_microseconds(phase, 10_000)
    for megabytes in (1, 10, 100):
        content = {1 - workers.rank: b"0" * megabytes * 10**6}
        found[f"exchange of {megabytes} MB, milliseconds"] = round(
            median_microseconds(lambda content=content: workers.exchange(content), 7) / 1000, 2
        )
    store = watchdog.connect()
    started = time.thread_time()
    for number in range(1000):
        watchdog.write(store, number)
    found["a beat, microseconds of CPU"] = round(1e6 * (time.thread_time() - started) / 1000, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--pair", action="store_true", help="as one of two processes that torchrun started")
    arguments = parser.parse_args()
    if arguments.pair:
        with join_workers() as workers:
            measured = measure_pair(workers)
            if workers.is_first:
                arguments.output.write_text(json.dumps(measured), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launcher, __file__, "--pair", "--output", str(pair)], check=True)
        measured = json.loads(pair.read_text(encoding="utf-8"))
    results = provenance() | {"command": "python bench/balance.py --output FILE"}
    results["assumed"] = {
        "mean tokens of a completion": MEAN,
        "cut off at": CUT_OFF,
        "completions a question": GROUP_SIZE,
        "mean seconds of a recording": AUDIO_SECONDS,
        "draws": NUM_DRAWS,
        "tolerance": TOLERANCE,
    }
    results["training"] = [
        {"ranks": ranks, "questions a rank": per_rank, "deviation over mean": deviation} | simulate(ranks, per_rank, deviation)
        for deviation, numbers in ((0.5, (1, 2, 4, 8)), (0.25, (4,)), (1.0, (4,)))
        for per_rank in numbers
        for ranks in NUM_RANKS
    ]
    results["two processes"] = measured
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
