"""Connections between GPUs by name, and the ranks that they connect. Used by `fastsd plan --gpus`.

Rates are in GB/s in one direction: of each GPU within a machine, of each machine in a network. `high` is what NCCL takes for
the connection (its `graph/topo.h` and `tuning.h`: PCIe 4.0 24 of 31.5 GB/s, NVLink of H100 370 of 450 and of A100 240 of 300).
`low` is, for PCIe, its rate between two sockets; for NVLink, four fifths of `high`. A network reaches from two thirds of its
rate, over TCP, to 0.96, over RDMA. `hop` is the time from one GPU to the next, also from `tuning.h`.
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from fastsd.errors import UserError
from fastsd.train.ranks import Ranks

PER_MACHINE = 8  # GPUs, the most that common machines hold


class Link(NamedTuple):
    """A type of connection. Rates are in GB/s in one direction, `hop` is in seconds."""

    name: str
    low: float
    high: float
    hop: float
    network: bool = False

    @property
    def text(self) -> str:
        """Name and rates."""
        rates = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        return f"{self.name + ', ' if self.name else ''}{rates} GB/s"


LINKS = {
    "pcie3": Link("PCIe 3.0", 6, 12, 5.7e-6),
    "pcie4": Link("PCIe 4.0", 10, 24, 5.7e-6),
    "pcie5": Link("PCIe 5.0", 20, 48, 5.7e-6),
    "nvlink3": Link("NVLink 3 (A100)", 192, 240, 3.4e-6),
    "nvlink4": Link("NVLink 4 (H100, H200)", 296, 370, 3.4e-6),
    "10gbe": Link("10 GbE", 0.83, 1.2, 14e-6, network=True),
    "25gbe": Link("25 GbE", 2.1, 3.0, 14e-6, network=True),
    "100gbe": Link("100 GbE", 8.3, 12, 14e-6, network=True),
    "200gbe": Link("200 GbE", 17, 24, 14e-6, network=True),
    "400gbe": Link("400 GbE", 33, 48, 14e-6, network=True),
}
_ALIASES = {"pcie": "pcie4", "nvlink": "nvlink4"}


class Cluster(NamedTuple):
    """The GPUs that train one run. `link` connects those of a machine, `network` the machines, if there are several."""

    gpus: int
    machines: int
    link: Link
    network: Link | None = None

    @property
    def ranks(self) -> Ranks:
        """Rank 0, which needs the most memory."""
        return Ranks(0, self.gpus, 0, self.gpus // self.machines)

    @property
    def text(self) -> str:
        """All of it, in words."""
        if self.machines == 1:
            return f"{self.gpus} GPUs in one machine ({self.link.text})" if self.gpus > 1 else "1 GPU"
        assert self.network is not None
        if self.gpus == self.machines:
            return f"{self.gpus} GPUs in as many machines ({self.network.text})"
        inside = f"{self.gpus // self.machines} GPUs each ({self.link.text})"
        return f"{self.gpus} GPUs in {self.machines} machines ({self.network.text}) with {inside}"


def find_link(text: str, option: str) -> Link:
    """Return a connection by its name, such as "pcie4" or "100 GbE", or with a rate in GB/s.

    Raises:
        UserError: it is neither.
    """
    try:
        rate = float(text)
    except ValueError:
        pass
    else:
        if not 0 < rate < math.inf:
            sender = "machine" if option == "--network" else "GPU"
            raise UserError("link-rate", f"{option} is {text}; give the GB/s that a {sender} sends in one direction, above 0")
        return Link("", rate, rate, LINKS["pcie4"].hop, network=option == "--network")
    short_name = "".join(c for c in text.lower().removesuffix(".0") if c.isalnum())
    short_name = _ALIASES.get(short_name, short_name)
    if short_name in LINKS:
        return LINKS[short_name]
    close = difflib.get_close_matches(short_name, LINKS, n=1)
    hint = f"did you mean {close[0]}?" if close else "or a rate in GB/s"
    raise UserError("link-unknown", f"{option} is {text!r}; choose from {', '.join(LINKS)}; {hint}")


def cluster_of(gpus: int | None, machines: int | None, interconnect: str, network: str) -> Cluster | None:
    """Return the GPUs that the options of `fastsd plan` describe. None without `--gpus`.

    A network as interconnect connects machines of one GPU each, unless `machines` says otherwise. More GPUs than
    `PER_MACHINE` are in several machines.

    Raises:
        UserError: an option is invalid, or needs another one.
    """
    if gpus is None:
        options = {"--interconnect": interconnect, "--machines": machines, "--network": network}
        option = next((name for name, value in options.items() if value not in (None, "")), None)
        if option is None:
            return None
        problem, example = f"{option} is {options[option]}, but --gpus is missing", PER_MACHINE * max(machines or 1, 1)
        raise UserError("gpus-missing", f"{problem}; add --gpus N, for example --gpus {example}")
    if gpus < 1:
        raise UserError("gpus-invalid", f"--gpus is {gpus}; give the number of GPUs that train together, at least 1")
    link = find_link(interconnect or "pcie4", "--interconnect")
    if machines is None:
        machines = gpus if link.network else next(n for n in range(-(-gpus // PER_MACHINE), gpus + 1) if gpus % n == 0)
    if machines < 1 or gpus % machines:
        counts = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
        raise UserError(
            "machines-invalid", f"--machines is {machines}, which does not divide {gpus} GPUs; choose from {counts}"
        )
    if machines == 1:
        if network:
            raise UserError(
                "network-of-one-machine",
                f"--network is {network}, but all {gpus} GPUs are in one machine; leave it out, or add --machines",
            )
        return Cluster(gpus, 1, link)
    return Cluster(
        gpus, machines, link, find_link(network, "--network") if network else link if link.network else LINKS["100gbe"]
    )
