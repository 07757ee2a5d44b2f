"""Communication of several GPUs as `fastsd plan` tells it. The model is in `communication.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.plan.communication import Message, Segment, StepTimes
from fastsd.plan.figures import range_text
from fastsd.plan.links import Cluster
from fastsd.terminal.texts import size_text


def describe_ranks(
    segments: Sequence[Segment], times: Mapping[str, StepTimes], cluster: Cluster, images: int
) -> dict[str, Any]:
    """Describe the communication of a step as JSON, with sizes in bytes per GPU and times in seconds.

    Args:
        times: predicted steps by card.
        images: of a batch, on one GPU.
    """
    messages = [segment.event for segment in segments if isinstance(segment.event, Message)]
    entry: dict[str, Any] = {"gpus": cluster.gpus, "machines": cluster.machines, "images": images, "messages": len(messages)}
    early = sum(message.sent_bytes(cluster.gpus) for message in messages if message.hidden)
    entry |= {"sent": sum(message.sent_bytes(cluster.gpus) for message in messages), "sent_early": early}
    entry["waits"] = {card: list(time.waits) for card, time in times.items()}
    return entry | {"efficiency": {card: list(time.efficiency) for card, time in times.items()}}


def columns(ranks: Mapping[str, Any] | None, card: str = "") -> str:
    """Return the columns that several GPUs add to the table of speeds: of a card, or their names."""
    if not ranks:
        return ""
    if not card:
        return f"{'efficiency':>14}   waits in a step"
    low, high = (100 * share for share in ranks["efficiency"][card])
    return f"{f'{low:.0f}-{high:.0f} %':>14}   {range_text([1000 * seconds for seconds in ranks['waits'][card]])} ms"


def lines_of(ranks: Mapping[str, Any]) -> list[str]:
    """Return the lines on what a GPU sends, and on its memory with sharded state."""
    share = 100 * ranks["sent_early"] / ranks["sent"]
    sent = f"each GPU sends {size_text(ranks['sent'])} per step in {ranks['messages']} messages"
    lines = [f"{sent}; {share:.1f} % of it can leave before the backward ends"]
    if "sharded" in ranks:
        sharded, unsharded = (f"{ranks[key] / (1 << 30):.2f} GiB" for key in ("sharded", "unsharded"))
        lines.append(f"with shard_state = true, each GPU needs {sharded} in total, without it {unsharded}")
    return lines
