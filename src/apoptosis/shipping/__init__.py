"""A shrunk network written so that it runs without this library.

Holds: `ship`, and what it returns. Elsewhere: checkpoints to go on training from (checkpoint).
"""

from apoptosis.shipping.records import Shipment, ShippedFile
from apoptosis.shipping.ship import ship

__all__ = ["Shipment", "ShippedFile", "ship"]
