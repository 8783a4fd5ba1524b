"""Print the network interface by which this machine reaches another: `python launch/interface.py HOST`."""

import fcntl
import socket
import struct
import sys

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of netdevice(7)
_ELSEWHERE = "192.0.2.1"  # no machine has this address: what leads there is the default route


def interface_to(host: str) -> str | None:
    """The interface with the address that packets to `host` leave from; None where only the loopback leads there.

    A host's own name may resolve to the loopback; then it is the interface of the default route.
    """
    addresses = interface_addresses()
    for target in (host, _ELSEWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))  # sends nothing: it only looks for the route
            except OSError:
                continue
            name = addresses.get(probe.getsockname()[0])
        if name is not None and name != "lo":
            return name
    return None


def interface_addresses() -> dict[str, str]:
    """Names of this machine's interfaces by their IPv4 addresses."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return found


def main(arguments: list[str]) -> int:
    """Print it, or say why there is none."""
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
