"""What was offered and taken, in whole numbers: the shared counters, and the arithmetic of mass."""

from .ledger import REPORT, Account, Ledger, effective_masses

__all__ = ["REPORT", "Account", "Ledger", "effective_masses"]
