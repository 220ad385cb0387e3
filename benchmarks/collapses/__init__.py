"""Small seeded runs that collapse, one module a failure mode, each with the harm that it does fixed beforehand.

`MODES` are the modes by name, `record` makes one run of one, `SETS` says which runs make the set that thresholds may be
chosen on and the one that they are judged on.
"""

from collapses._mode import Fault, Mode
from collapses._run import Setting, described, is_finished, record
from collapses._sets import FIRST_UNSEEN, MODES, SETS

__all__ = ["FIRST_UNSEEN", "MODES", "SETS", "Fault", "Mode", "Setting", "described", "is_finished", "record"]
