r"""The network between hosts: interfaces, and connections that are tried before any collective.

A collective between hosts that do not reach one another waits, and says nothing.  So the first
rank of each host connects to that of every other one, as a library would:

    host0  listens on any port, at every address   --->  publishes them where all look (a store)
    host1  connects, within `PATIENCE` seconds     --->  publishes whether the listener answered

What answers must be the listener itself: an interface that every host has with the same address,
such as docker0, leads back to the host that asks.
"""

import fcntl
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

PATIENCE = 6.0
"""Seconds for a connection: the kernel asks a second time after 1 s, and again after 3 s."""
PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
ANOTHER = "another process answers"
_SIOCGIFADDR = 0x8915
_TOKEN = 32
_AT_ONCE = 32


class Place(NamedTuple):
    """Where a rank listens.

    Attributes
    ----------
    rank : int
    host : str
    addresses : dict
        By interface.
    own : str
        The address at which the library would be reached.
    port : int
    token : str
        What the listener answers.
    ports : str
        The ports that this host gives to listeners.
    """

    rank: int
    host: str
    addresses: dict[str, str]
    own: str
    port: int
    token: str
    ports: str


class Attempt(NamedTuple):
    """A connection that was tried; `failure` is empty if the right listener has answered."""

    source: Place
    target: Place
    address: str
    failure: str


def addresses() -> dict[str, str]:
    """Return the IPv4 addresses by interface, without those of the loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has none
                reply = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(reply[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


class Listener:
    """Answers all that connect with a token, until it is closed.

    Parameters
    ----------
    rank : int
    own : str
        The address at which the library would be reached.
    """

    def __init__(self, rank: int, own: str) -> None:
        try:
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True
            )
        except (OSError, ValueError):  # no IPv6
            self._socket = socket.create_server(("", 0))
        ports = "-".join(PORTS.read_text().split()) if PORTS.exists() else "of any number"
        port, token = self._socket.getsockname()[1], uuid4().hex
        self.place = Place(rank, socket.gethostname(), addresses(), own, port, token, ports)
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError):
                connection.sendall(self.place.token.encode())


def try_connections(source: Place, places: list[Place]) -> list[Attempt]:
    """Connect from this rank, the first of its host, to the first rank of each other host.

    At a host that is not reached, the addresses of all its interfaces are tried.
    """
    first: dict[str, Place] = {}
    for place in places:
        first.setdefault(place.host, place)
    if first[source.host] != source:
        return []
    others = [place for place in first.values() if place != source]
    with ThreadPoolExecutor(_AT_ONCE) as pool:

        def attempt(wanted: list[tuple[Place, str]]) -> list[Attempt]:
            failures = pool.map(lambda pair: _connect(*pair), wanted)
            return [
                Attempt(source, *pair, text) for pair, text in zip(wanted, failures, strict=True)
            ]

        tried = attempt([(place, place.own) for place in others])
        missed = [a.target for a in tried if a.failure]
        return tried + attempt(
            [(p, address) for p in missed for address in p.addresses.values() if address != p.own]
        )


def longest(places: list[Place]) -> float:
    """Return the seconds that `try_connections` may take."""
    hosts = {place.host: place for place in places}
    rounds = ceil(len(hosts) / _AT_ONCE)
    rounds += ceil(sum(len(place.addresses) for place in hosts.values()) / _AT_ONCE)
    return 2 * PATIENCE * rounds  # to connect, and to be answered


def _connect(target: Place, address: str) -> str:
    """Return why a rank is not reached at an address; empty if it is."""
    try:
        with socket.create_connection((address, target.port), timeout=PATIENCE) as connection:
            answer = b""
            while len(answer) < _TOKEN and (part := connection.recv(_TOKEN)):
                answer += part
    except TimeoutError:
        return f"no answer in {PATIENCE:g} s"
    except OSError as error:
        return str(error.strerror or error)
    return "" if answer.decode(errors="replace") == target.token else ANOTHER


def unreachable(attempts: list[Attempt], variables: str) -> list[str]:
    """Return one line for each host that cannot be reached as the library would reach it.

    Parameters
    ----------
    attempts : list of Attempt
    variables : str
        Those that select the interface.
    """
    lines = []
    failed = [a for a in attempts if a.address == a.target.own and a.failure]
    for target in dict.fromkeys(a.target.host for a in failed):
        those = [a for a in failed if a.target.host == target]
        attempt, more = those[0], len(those) - 1
        source, aim = attempt.source, attempt.target
        others = f" (nor can {more} other host{'s' * (more != 1)})" if more else ""
        lines.append(
            f"rank {source.rank} on {source.host} ({listed(source.addresses)}) cannot connect to "
            f"rank {aim.rank} on {aim.host} at {aim.own}:{aim.port} ({_interface(aim)}): "
            f"{attempt.failure}{others}; {_cure(attempt, attempts, variables)}"
        )
    return lines


def _cure(failed: Attempt, attempts: list[Attempt], variables: str) -> str:
    aim = failed.target
    whole = []
    for name, address in aim.addresses.items():
        tried = [a.failure for a in attempts if (a.target, a.address) == (aim, address)]
        if tried and not any(tried):
            whole.append(name)
    if aim.own.startswith("127."):
        start = f"the name {aim.host} leads to the loopback there, see its /etc/hosts"
    elif aim.own in failed.source.addresses.values():
        start = f"{failed.source.host} has the address {aim.own}, too"
    elif failed.failure == ANOTHER:
        start = f"another host has the address {aim.own}, too"
    elif whole:
        start = f"{_interface(aim)} is not connected to the other hosts, or a firewall closes it"
    else:
        return (
            f"a firewall? Let the hosts connect to one another on ports {aim.ports}, or select "
            f"another interface: {variables}"
        )
    return f"{start}: {_set(variables, whole)}"


def _set(variables: str, interfaces: list[str]) -> str:
    name = interfaces[0] if interfaces else "an interface between the hosts"
    return "set " + " and ".join(f"{variable}={name}" for variable in variables.split(", "))


def _interface(place: Place) -> str:
    return next((n for n, a in place.addresses.items() if a == place.own), "lo")


def listed(found: dict[str, str]) -> str:
    """Return interfaces and their addresses as ``"e0 10.0.0.1, ib0 10.1.0.1"``."""
    return ", ".join(f"{name} {address}" for name, address in found.items()) or "no interface"
