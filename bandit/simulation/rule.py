"""The real bandit service in a modelled world: real events, real stream twin, real rule, real ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specblock.bandit.config import PolicyConfig, ServiceConfig
from specblock.bandit.decision import FAULT
from specblock.bandit.estimate import LinearEvidence
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.ledger import DECIDED, read_ledger
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.service import BanditService
from specblock.bandit.simulation.served import ServedWorld
from specblock.bandit.stream_types import StreamEntry


class RealRule:
    """Drives a ``BanditService`` whose outside world is ``world``.

    Args:
        world: acted upon.
        policy: the decision rule's numbers.
        directory: for ledger and snapshots.
        decide_every_s: longest time between two decisions.
        decide_every_events: requests without which nothing new is decided.
        forget_gains: the model never learns what its arms really gained (an ablation).
    """

    def __init__(
        self,
        world: ServedWorld,
        policy: PolicyConfig,
        directory: Path,
        *,
        decide_every_s: float,
        decide_every_events: int,
        forget_gains: bool = False,
    ) -> None:
        self._world, self._forget_gains = world, forget_gains
        self._stream = MemoryStream(MemoryLog(clock=lambda: world.now_s), max_entries=1024)
        self.ledger_path = directory / "ledger.jsonl"
        config = ServiceConfig(
            directory=str(directory),
            decide_every_s=decide_every_s,
            decide_every_events=decide_every_events,
            read_count=1024,
            # Nothing crashes here, and snapshots would be most of the run.
            keep_snapshots=0,
        )
        self._events: dict[str, AcceptanceEvent] = {}
        self.service = BanditService(self._stream, world, policy, config, self._understand)
        world.on_request = self._tell

    def step(self, now_s: float) -> None:
        """One step of the service.

        Raises:
            RuntimeError: an action failed, which the modelled world never does on purpose.
        """
        if self._forget_gains:
            known = self.service.state.policy
            arms = {name: replace(evidence, gain=LinearEvidence()) for name, evidence in known.arms.items()}
            self.service.state.policy = replace(known, arms=arms)
        if error := self.service.step(now_s).error:
            raise RuntimeError(f"an action failed in the modelled world: {error}")

    def close(self) -> None:
        """Last snapshot."""
        self.service.close(self._world.now_s)

    def faults(self) -> int:
        """Decisions that reported a fault."""
        return sum(r.stage == DECIDED and r.verdict == FAULT for r in read_ledger(self.ledger_path))

    def _understand(self, entry: StreamEntry) -> AcceptanceEvent:
        return self._events.pop(entry.fields["event"])

    def _tell(self, number: int) -> None:
        # Writing and reading the wire format (tested where it lives) would be a third of a run.
        self._events[f"{number}"] = self._world.event(number)
        self._stream.append({"event": f"{number}"})
