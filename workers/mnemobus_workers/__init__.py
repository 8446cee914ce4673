"""The worker pool of mnemobus: ``dramatiq mnemobus_workers``, or ``mnemobus worker``.

Importing this package makes Dramatiq's broker, from the settings in the environment.
"""

import dramatiq

from mnemobus.settings import Settings

from .pool import make_broker

broker = make_broker(Settings.load())
dramatiq.set_broker(broker)

__all__ = ["broker", "make_broker"]
