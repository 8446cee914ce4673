"""The worker pool of mnemobus: ``dramatiq mnemobus_workers``, or ``mnemobus worker``.

To import this package is to make Dramatiq's broker, from the settings of the environment.
"""

import dramatiq

from mnemobus.settings import Settings

from .pool import make_broker

broker = make_broker(Settings.load())
dramatiq.set_broker(broker)

__all__ = ["broker", "make_broker"]
