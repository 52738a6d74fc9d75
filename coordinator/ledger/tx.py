"""A transaction: everything that services and drivers may ask of the ledger."""

from __future__ import annotations

from coordinator.ledger.costs import Costs
from coordinator.ledger.leases import Leases
from coordinator.ledger.log import LogLeaves
from coordinator.ledger.people import People
from coordinator.ledger.privacy import PrivacySpends
from coordinator.ledger.rounds import Rounds
from coordinator.ledger.secure import SecureMessages
from coordinator.ledger.uploads import Uploads


class Tx(LogLeaves, Costs, People, Rounds, Uploads, SecureMessages, PrivacySpends, Leases):
    """One open transaction. It ends with the function that ``Ledger.run`` calls with it."""
