"""What the harness raises: a fault of the kernel, never of the machine it runs on."""


class HarnessError(Exception):
    """The kernel is faulty; the message says how and, where it can, in which line."""


class TranslationError(HarnessError):
    """The text does not compile, so nothing is known about what it does."""
