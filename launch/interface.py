"""Print the network interface through which this machine reaches another: `python launch/interface.py HOST`."""

import socket
import sys

import psutil

_ELSEWHERE = "192.0.2.1"  # TEST-NET-1, assigned to no machine, hence routed by default


def interface_to(host: str) -> str | None:
    """The interface whose address is the source of packets to `host`; None where that is the loopback only.

    A host's own name may resolve to the loopback; the result is then the interface of the default route.
    """
    addresses = interface_addresses()
    for target in (host, _ELSEWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))  # UDP: only looks up the route, sends nothing
            except OSError:
                continue
            name = addresses.get(probe.getsockname()[0])
        if name is not None and name != "lo":
            return name
    return None


def interface_addresses() -> dict[str, str]:
    """Names of this machine's interfaces by IPv4 address."""
    found = psutil.net_if_addrs().items()
    return {one.address: name for name, addresses in found for one in addresses if one.family == socket.AF_INET}


def main(arguments: list[str]) -> int:
    """Print the interface, or an error."""
    (host,) = arguments
    name = interface_to(host)
    if name is None:
        print(
            f"error: no interface leads to {host}; set GLOO_SOCKET_IFNAME to the one that the nodes share",
            file=sys.stderr,
        )
        return 2
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
