"""What the other ranks launch: a connection to each, and a wait that no rank is left in for ever.

Whatever a rank launches it tells each other rank concerned, over a socket of their own. So for each
pair of ranks there are two lists of launches, one a rank, that hold the same groups, operations
and sizes in the same order if the program is right. They are compared as they arrive.

A rank that waits for another longer than a moment tells all ranks whom it waits for, and how many
launches it told each of them. If whom it waits for waits for somebody, and so on until here, no
message can still be on its way: the ranks of that circle wait for ever.
"""

import json
import select
import socket
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import Any

import torch.distributed as dist
from attrs import astuple, define, field

from megatron_mimo_coord.cpu.launch_rules import disagreement
from megatron_mimo_coord.cpu.launches import Launch, Message
from megatron_mimo_coord.world.gather import all_gather_text

MOMENT = 0.5  # seconds of waiting after which a rank asks whether all wait


@define
class Note:
    """What a rank that waits tells all others."""

    waits_for: dict[int, int]  # rank -> number of the launch that it has not told
    told: dict[int, int]  # rank -> launches that this one has told it
    what: str


@define(eq=False)
class Peer:
    """Another rank: what it said, and what it was told."""

    rank: int
    connection: socket.socket
    buffer: bytes = b""
    mine: deque[Message | None] = field(factory=deque)  # not matched yet; None: refused here
    theirs: deque[Message | str] = field(factory=deque)  # not matched yet, or why it was refused
    num_told: int = 0
    num_heard: int = 0
    note: Note | None = None
    stopped: str = ""
    is_gone: bool = False

    @property
    def has_stopped(self) -> bool:
        """Whether it launches nothing any more."""
        return self.is_gone or bool(self.stopped)


class Peers:
    """The other ranks of the world.

    Args:
        rank: this rank.
        connections: a socket to each other rank.
    """

    def __init__(self, rank: int, connections: dict[int, socket.socket]) -> None:
        self.rank = rank
        self._note = Note({}, {}, "")
        self._peers = {other: Peer(other, sock) for other, sock in connections.items()}

    @classmethod
    def connect(cls) -> "Peers":
        """Connect the ranks of the world, which must share a machine. Collective."""
        rank, size = dist.get_rank(), dist.get_world_size()
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            path = str(Path(folder, "rank"))
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(size)
            paths = all_gather_text(path)
            connections = {}
            for other in range(rank):
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.connect(paths[other])
                except FileNotFoundError as error:
                    raise RuntimeError(
                        f"rank {rank} cannot reach rank {other}: all ranks of a rehearsal must be "
                        f"on one machine"
                    ) from error
                sock.sendall(rank.to_bytes(4, "big"))
                connections[other] = sock
            for _ in range(rank + 1, size):
                sock, _ = listener.accept()
                connections[int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "big")] = sock
            listener.close()
        return cls(rank, connections)

    def end(self, timeout: float) -> None:
        """Tell that this rank launches no more, and ask the others whether they did all of theirs.

        Args:
            timeout: seconds to wait for ranks that still owe a launch.

        Raises:
            RuntimeError: one of two ranks launched what the other never did.
        """
        everybody = list(self._peers.values())
        for peer in everybody:
            self._send(peer, ["ended"])
        started = monotonic()
        self._hear(everybody, 0)
        self._compare(everybody)
        while owing := [each for each in everybody if each.mine and not each.has_stopped]:
            if monotonic() - started > timeout:
                break
            self._hear(owing, MOMENT)
            self._compare(owing)
        for peer in everybody:
            for launches, one, other in (
                (peer.mine, self.rank, peer.rank),
                (peer.theirs, peer.rank, self.rank),
            ):
                if launches and isinstance(launches[0], Message):
                    raise RuntimeError(
                        f"rank {one} launched {launches[0]}, and rank {other} never did"
                    )

    def close(self) -> None:
        """The world is gone."""
        for peer in self._peers.values():
            peer.connection.close()
        self._peers = {}

    def tell(self, launch: Launch) -> None:
        """Tell each rank concerned of a launch, and compare with what it said."""
        for other, message in launch.messages.items():
            peer = self._peers[other]
            launch.turns[other] = peer.num_told
            peer.num_told += 1
            peer.mine.append(message)
            self._send(peer, ["launch", *astuple(message)])
        self._compare(self._peers[other] for other in launch.messages)

    def tell_refusal(self, launch: Launch, reason: str) -> None:
        """Tell each rank concerned that a launch was refused here."""
        for other in launch.messages:
            peer = self._peers[other]
            peer.num_told += 1
            peer.mine.append(None)
            self._send(peer, ["refused", reason])

    def wait_for(self, launch: Launch) -> None:
        """Wait until all ranks concerned have launched what belongs to a launch.

        Raises:
            RuntimeError: they launched something else, wait for each other, are gone or take longer
                than the timeout.
        """
        started = asked = monotonic()
        while missing := self._missing(launch):
            self._hear(missing, MOMENT)
            self._compare(missing)
            missing = self._missing(launch)
            for peer in missing:
                if peer.has_stopped:
                    why = f"stopped: {peer.stopped}" if peer.stopped else "has ended"
                    self._fail(f"{self._waiting(launch, missing)}, which {why}")
            now = monotonic()
            if missing and now - asked >= MOMENT:
                asked = now
                self._tell_waiting(launch, missing)
                self._fail_in_circle()
                if now - started > launch.timeout():
                    self._fail(f"{self._waiting(launch, missing)} for {now - started:.0f} s")

    def _missing(self, launch: Launch) -> list[Peer]:
        peers = [self._peers[other] for other in launch.turns]
        return [peer for peer in peers if peer.num_heard <= launch.turns[peer.rank]]

    def _waiting(self, launch: Launch, missing: list[Peer]) -> str:
        ranks = ", ".join(str(peer.rank) for peer in missing)
        return f"rank {self.rank} waits in {launch} for rank{'s'[: len(missing) > 1]} {ranks}"

    def _compare(self, peers: Iterable[Peer]) -> None:
        for peer in peers:
            while peer.mine and peer.theirs:
                mine, theirs = peer.mine.popleft(), peer.theirs.popleft()
                if mine is None:
                    continue
                if isinstance(theirs, str):
                    raise RuntimeError(f"rank {peer.rank} stopped: {theirs}")
                problem = disagreement(mine, theirs, self.rank, peer.rank)
                if problem:
                    self._fail(problem, known_to=peer)

    def _fail(self, problem: str, known_to: Peer | None = None) -> None:
        """Raise, and tell the ranks that may wait for this one why."""
        for peer in self._peers.values():
            if peer is not known_to:
                self._send(peer, ["stopped", problem])
        raise RuntimeError(problem)

    # -- who waits for whom ------------------------------------------------------------------------

    def _tell_waiting(self, launch: Launch, missing: list[Peer]) -> None:
        self._note = Note(
            waits_for={peer.rank: launch.turns[peer.rank] for peer in missing},
            told={peer.rank: peer.num_told for peer in self._peers.values()},
            what=self._waiting(launch, missing),
        )
        for peer in self._peers.values():
            told = list(self._note.waits_for.items()), list(self._note.told.items())
            self._send(peer, ["waits", *told, self._note.what])
        self._hear(list(self._peers.values()), 0)

    def _fail_in_circle(self) -> None:
        notes = {rank: peer.note for rank, peer in self._peers.items() if peer.note}
        notes[self.rank] = self._note

        def circle(path: list[int]) -> list[int] | None:
            waiting = notes[path[-1]]
            for other, turn in waiting.waits_for.items():
                if other in notes and notes[other].told.get(path[-1], 0) <= turn:
                    if other == self.rank:
                        return path
                    if other not in path and (found := circle([*path, other])):
                        return found
            return None

        ranks = circle([self.rank])
        if ranks:
            told = "; ".join(notes[rank].what for rank in ranks)
            self._fail(f"ranks {', '.join(map(str, ranks))} wait for each other for ever: {told}")

    # -- messages ----------------------------------------------------------------------------------

    def _send(self, peer: Peer, message: list[Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data and not peer.is_gone:
            try:
                data = data[peer.connection.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:  # it may be trying to tell us something
                self._hear(list(self._peers.values()), 0.01)
            except (BrokenPipeError, ConnectionResetError):
                return  # what it said before is still to be heard

    def _hear(self, peers: list[Peer], seconds: float) -> None:
        """Read what has arrived from some ranks; wait for something to arrive."""
        listening = {peer.connection: peer for peer in peers if not peer.is_gone}
        for connection in select.select(list(listening), [], [], seconds)[0]:
            peer = listening[connection]
            try:
                data = connection.recv(1 << 16)
            except ConnectionResetError:
                continue  # told once; what it said before is still to be heard
            peer.is_gone = peer.is_gone or not data
            *lines, peer.buffer = (peer.buffer + data).split(b"\n")
            for line in lines:
                self._understand(peer, *json.loads(line))

    def _understand(self, peer: Peer, kind: str, *parts: Any) -> None:
        if kind == "waits":
            waits_for, told, what = parts
            peer.note = Note(dict(waits_for), dict(told), what)
        elif kind == "ended":
            peer.is_gone = True
        elif kind == "stopped":
            [peer.stopped] = parts
        else:
            peer.stopped = ""
            peer.num_heard += 1
            peer.theirs.append(Message(*parts) if kind == "launch" else parts[0])
