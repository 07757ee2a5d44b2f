"""Print the table of faults: how many were tried, how many lost nothing, and why the others did.

    python tests/faults/table.py            a sample, in about three minutes
    python tests/faults/table.py --full     200 kills, 25 failing calls for each kind of file, every power cut; hours

`PYTHONPATH` must have the checkout, kernels, tests/support and tests/faults.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import kinds
from jobs import Workshop, workshop
from power_cuts import power_cuts


def rows(shop: Workshop, *, full: bool, seed: int) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield each kind of fault and its trials."""
    rng = random.Random(seed)
    yield "kill -9, ten jobs", kinds.kills(shop, 200 if full else 20, rng)
    yield "power cut", power_cuts(shop, 1 if full else 97, rng)
    for kind in kinds.FILES:
        yield f"failing disk: {kind}", kinds.disk_errors(shop, kind, 25 if full else 1, rng)
    for name in kinds.COMMANDS:
        numbers = kinds.SIGNALS if full else rng.sample(kinds.SIGNALS, 2)
        yield f"12 signals: {name}", (reason for number in numbers for reason in kinds.signals(shop, name, number, rng))
    yield "damaged file, 5 ways", kinds.damages(shop, 1 if full else 31, rng)
    yield "broken restore is noticed", kinds.controls(shop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'kind':44} {'tried':>6} {'survived':>8}  not survived, because", flush=True)
    with workshop() as shop:
        for kind, trials in rows(shop, full=options.full, seed=options.seed):
            reasons = Counter(trials)
            lost = [f"{count} x {reason}" for reason, count in reasons.most_common() if reason]
            print(f"{kind:44} {reasons.total():6} {reasons['']:8}  {'; '.join(lost[:6])}", flush=True)


if __name__ == "__main__":
    main()
