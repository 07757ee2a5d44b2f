"""Print the table of faults: how many were tried, how many lost nothing, and why the others did.

    python tests/faults/table.py                  a sample, in about three minutes
    python tests/faults/table.py --share 1        200 kills, 25 failing disks for each kind of file, every power cut; hours
    python tests/faults/table.py --only "kill"    only kinds whose name matches

`PYTHONPATH` must have the checkout, kernels, tests/support and tests/faults. Read first: `tests/faults/lab.py`.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import kinds
from jobs import Workshop, workshop
from power_cuts import power_cuts


def rows(shop: Workshop, share: float, rng: random.Random) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield each kind of fault and its trials, of which a share is made."""
    yield "kill -9, ten jobs", kinds.kills(shop, max(int(200 * share), 10), rng)
    yield "power cut", power_cuts(shop, max(int(1 / share), 1), rng)
    for kind in kinds.FILES:
        yield f"failing disk: {kind}", kinds.disk_errors(shop, kind, max(int(25 * share), 1), rng)
    for name in kinds.COMMANDS:
        numbers = rng.sample(kinds.SIGNALS, max(int(12 * share), 2))
        yield f"12 signals: {name}", (reason for number in numbers for reason in kinds.signals(shop, name, number, rng))
    yield "damaged file, 5 ways", kinds.damages(shop, max(int(1 / share), 1), rng)
    yield "broken restore is noticed", kinds.controls(shop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'kind':44} {'tried':>6} {'survived':>8}  not survived, because", flush=True)
    with workshop() as shop:
        for kind, trials in rows(shop, options.share, random.Random(options.seed)):
            if not re.search(options.only, kind):
                continue
            reasons = Counter(trials)
            lost = [f"{count} x {reason}" for reason, count in reasons.most_common() if reason]
            print(f"{kind:44} {reasons.total():6} {reasons['']:8}  {'; '.join(lost[:6])}", flush=True)


if __name__ == "__main__":
    main()
