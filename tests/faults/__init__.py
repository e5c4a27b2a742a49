"""Every fault at every place of a transaction: the matrix, how one cell of it is run, and what must be true afterwards.

A cell is one message to three recipients, sent by one client to a scripted server that fails at one place in one way,
once or for ever. The server is the witness: what it took is compared with what the client reports. `test_faults.py`
enumerates the cells, `reliability.py` counts them.

Not in the matrix, because no client can know better:

*   A server that lies: it takes the message and says 451, or says 250 and drops it. The reply is all that there is.
*   A second reply in a packet of its own, while the client waits for the first: it *is* the reply, as far as anybody can
    tell. In the same packet as a reply (the matrix has that) it can be told, and between two commands it is thrown away.
    After a refused body it is the one way to lose a mail; after any other command the client falls out of step by one
    reply, and notices at DATA, whose 354 is like no other reply (`test_hostile.py` shows it).
*   The same inside a body that went out in one write: a 250 that comes before the dot was read counts as the answer to
    it. The matrix has the case where the server takes the message after all.
"""

from .matrix import (
    BEFORE_MAIL,
    BYE,
    FAULTS,
    FRIEND,
    GIVE_UP_AFTER,
    HUGE,
    LARGE,
    LATER,
    MANY,
    MODES,
    NAME,
    NEVER,
    PATIENCE,
    PLACES,
    RECIPIENTS,
    SENDER,
    SMALL,
    STRANGER,
    UNCLEAN,
    Cell,
    Fault,
    Mode,
    Place,
    cells,
)
from .runs import (
    Run,
    Taken,
    Watched,
    broken_promises,
    clean,
    client_for,
    copies,
    disagreements,
    install,
    name_of,
    offered_again,
    policy,
    probe,
    run,
    server_for,
    take_little,
)

__all__ = [
    "BEFORE_MAIL",
    "BYE",
    "FAULTS",
    "FRIEND",
    "GIVE_UP_AFTER",
    "HUGE",
    "LARGE",
    "LATER",
    "MANY",
    "MODES",
    "NAME",
    "NEVER",
    "PATIENCE",
    "PLACES",
    "RECIPIENTS",
    "SENDER",
    "SMALL",
    "STRANGER",
    "UNCLEAN",
    "Cell",
    "Fault",
    "Mode",
    "Place",
    "Run",
    "Taken",
    "Watched",
    "broken_promises",
    "cells",
    "clean",
    "client_for",
    "copies",
    "disagreements",
    "install",
    "name_of",
    "offered_again",
    "policy",
    "probe",
    "run",
    "server_for",
    "take_little",
]
